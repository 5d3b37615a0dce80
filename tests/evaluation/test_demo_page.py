"""The page to try a network, opened in a browser."""

import base64
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from browser import open_browser, plain
from evaluation.runs import write_run
from evaluation.smooth import smooth_picture
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from resnest_jax import from_checkpoint
from resnest_jax.data.labels import ADE20K

pytestmark = pytest.mark.long

SECONDS = 120  # To wait for what a busy machine may take long for.
EVIL = '<b>evil & "co".png'
PHONE = {'width': 360, 'height': 740, 'deviceScaleFactor': 1, 'mobile': True}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder with pictures of all kinds, and one that is none."""
  folder = tmp_path_factory.mktemp('pictures')
  photo = Image.fromarray(smooth_picture())
  photo.save(folder / 'photo.png')
  turned = Image.Exif()
  turned[0x0112] = 6  # To be turned clockwise.
  photo.save(folder / 'turned.jpg', exif=turned)
  photo.convert('L').save(folder / 'grey.png')
  photo.putalpha(128)
  photo.save(folder / EVIL)
  (folder / 'broken.jpg').write_bytes((folder / 'turned.jpg').read_bytes()[:99])
  return folder


class Listener(socketserver.ThreadingTCPServer):
  """Stands where a proxy would; what asks it for other hosts is counted."""

  asked = 0

  def process_request(self, request, client_address):
    type(self).asked += 1
    self.shutdown_request(request)


@pytest.fixture(scope='module')
def address(run, pictures, tmp_path_factory):
  """The page, served by the command, until Ctrl-C."""
  uploads = tmp_path_factory.mktemp('uploads')
  one = '--xla_force_host_platform_device_count=1'
  flags = re.sub(r'--xla_force_host\S*', one, os.environ['XLA_FLAGS'])
  with Listener(('127.0.0.1', 0), None) as proxy:
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    proxy_address = 'http://127.0.0.1:{1}'.format(*proxy.server_address)
    process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'resnest_jax.demo', '--weights', run),
        *('--checkpoint', '7', '--port', '0'),
        *('--examples', pictures / 'photo.png'),
      ],
      env=os.environ
      | {
        **dict.fromkeys(('HTTP_PROXY', 'HTTPS_PROXY'), proxy_address),
        **{'NO_PROXY': '127.0.0.1,localhost', 'TMPDIR': str(uploads)},
        'XLA_FLAGS': flags,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    lines = []
    for line in process.stdout:
      lines.append(line)
      if found := re.search(r'the page is at (http://127\.0\.0\.1:\d+/)', line):
        break
    assert found, ''.join(lines)
    yield found[1]
    assert list(uploads.iterdir()) != []
    # As schedulers do; Ctrl-C goes the same way.
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said == ''
    assert list(uploads.glob('resnest_jax_demo_*')) == []
    proxy.shutdown()
    assert proxy.asked == 0


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  profile = tmp_path_factory.mktemp('profile')
  with open_browser(profile, ('browser', 'performance')) as browser:
    browser.get('about:blank')
    browser.get_log('performance')  # Of the browser's own start page.
    yield browser


@pytest.fixture
def opened(browser, address):
  """The page, freshly opened; in the end nothing may have gone wrong."""
  open_page(browser, address)
  yield browser
  serious = [x for x in browser.get_log('browser') if x['level'] == 'SEVERE']
  assert serious == []


def open_page(browser, address):
  browser.get(address)
  wait(browser, '#picture input[type=file]')


def wait(browser, selector):
  """The first element that the selector finds, as soon as there is one."""
  return WebDriverWait(browser, SECONDS).until(
    lambda browser: next(
      iter(browser.find_elements(By.CSS_SELECTOR, selector)), None
    )
  )


def upload(browser, path):
  """Gives the page a picture, and waits for what it says."""
  box = browser.find_element(By.CSS_SELECTOR, '#picture input[type=file]')
  box.send_keys(str(path))
  wait(browser, '#legend td, .problem')


def shown(browser, kind):
  """The pixels of a layer, as they came."""
  image = browser.find_element(By.CSS_SELECTOR, f'.layers .{kind}')
  encoded = image.get_attribute('src').split(';base64,')[1]
  pixels = np.frombuffer(base64.b64decode(encoded), np.uint8)
  return cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB)


def facts(browser):
  return plain(browser.find_element(By.ID, 'facts').text)


def table(browser):
  """Class -> colour and share in percent, as they are written."""
  rows = browser.find_elements(By.CSS_SELECTOR, '#legend tbody tr')
  found = {}
  for row in rows:
    swatch = row.find_element(By.CSS_SELECTOR, '.swatch')
    colour = swatch.value_of_css_property('background-color')
    found[row.find_element(By.TAG_NAME, 'th').text] = (
      tuple(map(int, re.findall(r'\d+', colour)[:3])),
      row.find_element(By.CSS_SELECTOR, '.share').text.removesuffix(' %'),
    )
  return found


def test_a_picture_gets_its_classes(opened, run, pictures):
  upload(opened, pictures / 'photo.png')
  expected = from_checkpoint(run).predict(pictures / 'photo.png')
  colours = shown(opened, 'colours')
  # Another padded shape rounds otherwise.
  same = (colours == expected.colors()).all(-1)
  assert same.mean() > 0.999
  assert len(np.unique(expected.labels)) > 1
  error = np.abs(shown(opened, 'photograph').astype(int) - expected.image)
  assert error.mean() < 3  # A JPEG.
  assert re.search(r'photo\.png: 120 x 90 pixels\.', facts(opened))
  assert re.search(
    r'at 64 x 48, padded to 256 x 256, for (\d+ ms|\d+\.\d s) on 1 x cpu',
    facts(opened),
  )
  # The table counts the pixels that are shown.
  found = table(opened)
  assert found
  total = 0
  for name, (colour, share) in found.items():
    assert colour == tuple(ADE20K.palette[ADE20K.classes.index(name)].tolist())
    counted = 100 * (colours == colour).all(-1).mean()
    if share == '< 0.1':
      assert counted < 0.1
    else:
      assert float(share) == pytest.approx(counted, abs=0.1)
      total += float(share)
  assert total == pytest.approx(100, abs=1e-6)


def test_the_slider_sets_the_opacity(opened, pictures):
  upload(opened, pictures / 'photo.png')
  layers = wait(opened, '.layers')
  slider = opened.find_element(By.CSS_SELECTOR, '#opacity input[type=range]')
  layer = opened.find_element(By.CSS_SELECTOR, '.layers .colours')
  assert layer.value_of_css_property('opacity') == '0.5'

  def looks():
    pixels = np.frombuffer(layers.screenshot_as_png, np.uint8)
    picture = cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB)
    return cv2.resize(picture, (120, 90), interpolation=cv2.INTER_AREA)

  def distance(picture):
    # Without borders of classes and the round corners.
    return np.median(np.abs(looks().astype(int) - picture), axis=(0, 1)).max()

  for key, opacity, picture in (
    (Keys.END, '1', shown(opened, 'colours')),
    (Keys.HOME, '0', shown(opened, 'photograph')),
  ):
    slider.send_keys(key)
    WebDriverWait(opened, SECONDS).until(
      lambda _, opacity=opacity: (
        layer.value_of_css_property('opacity') == opacity
      )
    )
    assert distance(picture) < 8
  slider.send_keys(*10 * [Keys.ARROW_RIGHT])
  WebDriverWait(opened, SECONDS).until(
    lambda _: layer.value_of_css_property('opacity') == '0.1'
  )


@pytest.mark.parametrize(
  ('name', 'size', 'turn'),
  [('turned.jpg', '90 x 120', 1), ('grey.png', '120 x 90', 0)],
)
def test_pictures_are_upright_and_may_be_grey(
  opened, pictures, name, size, turn
):
  upload(opened, pictures / name)
  assert f'{name}: {size} pixels' in facts(opened)
  upright = np.rot90(smooth_picture(), -turn).astype(int)
  if name == 'grey.png':
    upright = upright @ [[0.299] * 3, [0.587] * 3, [0.114] * 3]
  assert np.abs(shown(opened, 'photograph') - upright).mean() < 5


def test_transparency_is_left_out_and_names_are_text(opened, pictures):
  upload(opened, pictures / EVIL)
  assert '120 x 90 pixels' in facts(opened)
  assert opened.find_elements(By.CSS_SELECTOR, '#facts b') == []
  error = np.abs(shown(opened, 'photograph').astype(int) - smooth_picture())
  assert error.mean() < 3


def test_a_broken_file_is_told_and_the_next_one_works(
  opened, address, pictures
):
  upload(opened, pictures / 'broken.jpg')
  (problem,) = opened.find_elements(By.CSS_SELECTOR, '#overlay [role=alert]')
  assert problem.text.startswith('broken.jpg cannot be read as a picture')
  assert '/' not in problem.text
  assert table(opened) == {}
  open_page(opened, address)
  upload(opened, pictures / 'photo.png')
  assert 'photo.png' in facts(opened)


def test_keys_reach_everything(opened):
  """The example is chosen, the opacity set, without a mouse."""
  visited = []
  for _ in range(12):
    opened.switch_to.active_element.send_keys(Keys.TAB)
    visited.append(opened.switch_to.active_element)
  kinds = [
    next(
      (
        kind
        for kind, selector in {
          'upload': '#picture button',
          'example': '.gallery-item, .gallery button',
          'opacity': '#opacity input[type=range]',
        }.items()
        if opened.execute_script(
          'return arguments[0].matches(arguments[1])', element, selector
        )
      ),
      None,
    )
    for element in visited
  ]
  order = list(dict.fromkeys(kind for kind in kinds if kind))
  assert order == ['upload', 'example', 'opacity']
  visited[kinds.index('example')].send_keys(Keys.ENTER)
  wait(opened, '#legend td')
  assert 'photo.png' in facts(opened)


def test_page_follows_the_systems_theme(browser, address, pictures):
  brightness = {}
  for theme in ('light', 'dark'):
    feature = {'name': 'prefers-color-scheme', 'value': theme}
    browser.execute_cdp_cmd(
      'Emulation.setEmulatedMedia', {'features': [feature]}
    )
    open_page(browser, address)
    upload(browser, pictures / 'photo.png')
    for selector, key in (
      ('body', 'background-color'),
      ('#legend tbody th', 'color'),
      ('#facts p', 'color'),
    ):
      colour = browser.find_element(By.CSS_SELECTOR, selector)
      numbers = re.findall(r'[\d.]+', colour.value_of_css_property(key))[:3]
      numbers = np.array(numbers, float)
      scale = 255 if numbers.max() <= 1 else 1
      brightness[theme, selector] = numbers.mean() * scale
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})
  light, dark = (
    [brightness[t, s] for s in ('body', '#legend tbody th')]
    for t in ('light', 'dark')
  )
  assert light[0] > 240
  assert light[1] < 60
  assert dark[0] < 30
  assert dark[1] > 200


def test_it_fits_a_phone(browser, address, pictures):
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', PHONE)
  try:
    open_page(browser, address)
    upload(browser, pictures / 'photo.png')
    widths = browser.execute_script(
      'return [document.documentElement.scrollWidth, window.innerWidth,'
      'document.querySelector(".layers").getBoundingClientRect().width]'
    )
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
  assert widths[:2] == [360, 360]
  assert 250 < widths[2] < 360


def test_nothing_is_asked_of_other_hosts(browser, address):
  """Of all that the tests above have loaded."""
  open_page(browser, address)
  loaded = []
  for entry in browser.get_log('performance'):
    message = json.loads(entry['message'])['message']
    if message['method'] == 'Network.requestWillBeSent':
      loaded.append(message['params']['request']['url'])
  assert len(loaded) > 10
  others = [
    url
    for url in loaded
    if not url.startswith((address, 'data:', f'blob:{address}'))
  ]
  assert others == []
  hints = browser.find_elements(
    By.CSS_SELECTOR, 'link[rel~=preconnect], link[rel~=dns-prefetch]'
  )
  assert hints == []
