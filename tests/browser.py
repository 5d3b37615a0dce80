"""Opens Chromium or Chrome, which tests/find_browser.sh finds or installs."""

import base64
import contextlib
import re
import shutil

import cv2
import numpy as np
from data.small_archives import decode
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

PROGRAMS = 'chromedriver chromium chromium-browser google-chrome '
PROGRAMS += 'google-chrome-stable'
FLAGS = (
  '--headless --no-sandbox --disable-quic --no-first-run '
  '--disable-background-networking --disable-component-update --disable-sync '
  '--disable-dev-shm-usage --window-size=1280,1000'
)
PHONE = {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True}
WIDTHS = 'return [document.documentElement.scrollWidth, window.innerWidth]'


@contextlib.contextmanager
def open_browser(profile, logs=('browser',), flags=('--disable-gpu',)):
  """A driver of a browser without a window; the profile is an empty folder."""
  options = webdriver.ChromeOptions()
  driver, *browsers = map(shutil.which, PROGRAMS.split())
  assert driver, 'no chromedriver: see tests/find_browser.sh'
  assert any(browsers), 'no browser: see tests/find_browser.sh'
  options.binary_location = next(filter(None, browsers))
  for flag in (*FLAGS.split(), *flags, f'--user-data-dir={profile}'):
    options.add_argument(flag)
  # 'browser' is its console, 'performance' what it loads.
  options.set_capability('goog:loggingPrefs', dict.fromkeys(logs, 'ALL'))
  browser = webdriver.Chrome(options=options, service=Service(driver))
  try:
    yield browser
  finally:
    browser.quit()


@contextlib.contextmanager
def on_phone(browser, width=PHONE['width']):
  """Until the end the screen is small; checks that the page is no wider."""
  phone = PHONE | {'width': width}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', phone)
  try:
    yield
    assert browser.execute_script(WIDTHS) == [width, width]
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def set_media(browser, theme=None, media=''):
  """The system's theme, 'light' or 'dark', and 'print', if anything."""
  features = [{'name': 'prefers-color-scheme', 'value': theme}] if theme else []
  given = {'media': media, 'features': features}
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', given)


def one(browser, selector):
  return browser.find_element(By.CSS_SELECTOR, selector)


def every(browser, selector):
  return browser.find_elements(By.CSS_SELECTOR, selector)


def brightness(browser, selector, key):
  """Of a colour, 0 to 255."""
  colour = one(browser, selector).value_of_css_property(key)
  numbers = np.array(re.findall(r'[\d.]+', colour)[:3], float)
  return numbers.mean() * (255 if numbers.max() <= 1 else 1)


def decoded(image):
  """The pixels of an element whose source is a data URI."""
  encoded = image.get_attribute('src').split(';base64,')[1]
  return decode(base64.b64decode(encoded), cv2.IMREAD_COLOR_RGB)


def plain(text):
  """Sizes as they can be typed: without no-break spaces and signs of times."""
  return text.translate(str.maketrans('\xa0\xd7', ' x'))
