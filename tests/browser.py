"""Opens Chromium or Chrome, which tests/find_browser.sh finds or installs."""

import contextlib
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSERS = (
  *('chromium', 'chromium-browser'),
  *('google-chrome', 'google-chrome-stable'),
)
FLAGS = (
  *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic'),
  *('--no-first-run', '--disable-background-networking'),
  *('--disable-component-update', '--disable-sync'),
  *('--disable-dev-shm-usage', '--window-size=1280,1000'),
)


@contextlib.contextmanager
def open_browser(profile, logs=('browser',)):
  """A driver of a browser without a window.

  Args:
    profile: an empty folder.
    logs: to be asked for later: 'browser' is its console, 'performance' what
      it loads.
  """
  options = webdriver.ChromeOptions()
  options.binary_location = next(filter(None, map(shutil.which, BROWSERS)), '')
  driver = shutil.which('chromedriver')
  assert options.binary_location, 'no browser: see tests/find_browser.sh'
  assert driver, 'no chromedriver: see tests/find_browser.sh'
  for flag in (*FLAGS, f'--user-data-dir={profile}'):
    options.add_argument(flag)
  options.set_capability('goog:loggingPrefs', dict.fromkeys(logs, 'ALL'))
  browser = webdriver.Chrome(options=options, service=Service(driver))
  try:
    yield browser
  finally:
    browser.quit()


def plain(text):
  """Sizes as they can be typed."""
  text = text.replace('\N{NO-BREAK SPACE}', ' ')
  return text.replace('\N{MULTIPLICATION SIGN}', 'x')
