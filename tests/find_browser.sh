#!/usr/bin/env bash
# Tests open pages in a real browser: Chromium or Chrome, and chromedriver of the
# same version; npm fetches what the page of an export runs with. Where they are
# missing and this is Debian with root's rights, they are installed; elsewhere it
# is said what to install.
set -euo pipefail

found() {
  command -v chromedriver >/dev/null && command -v npm >/dev/null && {
    command -v chromium || command -v chromium-browser ||
      command -v google-chrome || command -v google-chrome-stable
  } >/dev/null
}

if ! found && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo 'installing Chromium and npm for the tests (a minute)'
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  { apt-get -q -o Acquire::Retries=3 update &&
    apt-get -q -o Acquire::Retries=3 install -y --no-install-recommends \
      chromium chromium-driver $(command -v npm >/dev/null || echo npm); } >"$log" 2>&1 || tail -n 20 "$log" >&2
  rm -f "$log"
fi
if ! found; then
  echo 'error: the tests need a browser, chromedriver of its version, and npm,' \
    'on the PATH. Install Chromium (Debian: apt install chromium' \
    'chromium-driver npm; Fedora: dnf install chromium chromedriver npm; macOS:' \
    'brew install --cask chromium chromedriver, brew install npm).' >&2
  exit 1
fi
