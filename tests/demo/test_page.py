"""The page to try a network, opened in a browser."""

import json
import re
import signal
import socketserver
import threading

import cv2
import numpy as np
import pytest
from browser import (
  decoded,
  every,
  on_phone,
  one,
  open_browser,
  plain,
  set_media,
)
from evaluation.drawn import smooth_picture
from hosts import finish, start
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from resnest_jax import from_checkpoint
from resnest_jax.labels import ADE20K

pytestmark = pytest.mark.long

SECONDS = 120  # To wait for what a busy machine may take long for.
EVIL = '<b>evil & "co".png'
UPLOAD = '#picture input[type=file]'
SLIDER = '#opacity input[type=range]'


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
def address(written_run, pictures, tmp_path_factory):
  """The page, served by the command, until Ctrl-C."""
  uploads = tmp_path_factory.mktemp('uploads')
  with Listener(('127.0.0.1', 0), None) as proxy:
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    proxy_address = 'http://127.0.0.1:{1}'.format(*proxy.server_address)
    process = start(
      *('-m', 'resnest_jax.demo', '--weights', written_run),
      *('--checkpoint', 7, '--port', 0, '--examples', pictures / 'photo.png'),
      devices=1,
      HTTP_PROXY=proxy_address,
      HTTPS_PROXY=proxy_address,
      NO_PROXY='127.0.0.1,localhost',
      TMPDIR=str(uploads),
    )
    page = re.compile(r'the page is at (http://127\.0\.0\.1:\d+/)')
    found = next(filter(None, map(page.search, process.stdout)), None)
    assert found, finish(process)
    yield found[1]
    assert list(uploads.iterdir()) != []
    # As schedulers do; Ctrl-C goes the same way.
    process.send_signal(signal.SIGTERM)
    said = finish(process, status=128 + signal.SIGTERM, timeout=SECONDS)
    assert said == ('', '')
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
  wait(browser, UPLOAD)


def wait(browser, selector):
  """Until there is such an element."""
  WebDriverWait(browser, SECONDS).until(lambda page: every(page, selector))


def upload(browser, path):
  """Gives the page a picture, and waits; returns what it says."""
  one(browser, UPLOAD).send_keys(str(path))
  wait(browser, '#legend td, .problem')
  return plain(one(browser, '#facts').text)


def photograph(browser):
  return decoded(one(browser, '.layers .photograph')).astype(int)


def table(browser):
  """Class -> colour and share in percent, as they are written."""
  found = {}
  for row in every(browser, '#legend tbody tr'):
    colour = one(row, '.swatch').value_of_css_property('background-color')
    found[one(row, 'th').text] = (
      tuple(map(int, re.findall(r'\d+', colour)[:3])),
      one(row, '.share').text.removesuffix(' %'),
    )
  return found


def test_a_picture_gets_its_classes(opened, written_run, pictures):
  facts = upload(opened, pictures / 'photo.png')
  assert 'photo.png: 120 x 90 pixels.' in facts
  assert re.search(
    r'at 64 x 48, padded to 256 x 256, for (\d+ ms|\d+\.\d s) on 1 x cpu', facts
  )
  expected = from_checkpoint(written_run).predict(pictures / 'photo.png')
  colours = decoded(one(opened, '.layers .colours'))
  # Another padded shape rounds otherwise.
  same = (colours == expected.colors()).all(-1)
  assert same.mean() > 0.999
  assert len(np.unique(expected.labels)) > 1
  error = np.abs(photograph(opened) - expected.image)
  assert error.mean() < 3  # A JPEG.
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
  layers, layer = one(opened, '.layers'), one(opened, '.layers .colours')
  assert layer.value_of_css_property('opacity') == '0.5'
  colours = decoded(layer)
  for keys, opacity, picture in (
    ([Keys.END], '1', colours),
    ([Keys.HOME], '0', photograph(opened)),
    (10 * [Keys.ARROW_RIGHT], '0.1', None),
  ):
    one(opened, SLIDER).send_keys(*keys)
    WebDriverWait(opened, SECONDS).until(
      lambda _, opacity=opacity: (
        layer.value_of_css_property('opacity') == opacity
      )
    )
    if picture is not None:
      pixels = np.frombuffer(layers.screenshot_as_png, np.uint8)
      looks = cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB)
      looks = cv2.resize(looks, (120, 90), interpolation=cv2.INTER_AREA)
      # Without borders of classes and the round corners.
      difference = np.abs(looks.astype(int) - picture)
      assert np.median(difference, axis=(0, 1)).max() < 8


@pytest.mark.parametrize(
  ('name', 'told', 'turn', 'error'),
  [
    ('turned.jpg', 'turned.jpg: 90 x 120 pixels', 1, 5),
    ('grey.png', 'grey.png: 120 x 90 pixels', 0, 5),
    (EVIL, ': 120 x 90 pixels', 0, 3),  # Its transparency is left out.
  ],
)
def test_pictures_are_upright_and_may_be_grey_and_names_are_text(
  opened, pictures, name, told, turn, error
):
  assert told in upload(opened, pictures / name)
  assert every(opened, '#facts b') == []
  upright = np.rot90(smooth_picture(), -turn)
  if name == 'grey.png':
    upright = upright @ [[0.299] * 3, [0.587] * 3, [0.114] * 3]
  assert np.abs(photograph(opened) - upright).mean() < error


def test_a_broken_file_is_told_and_the_next_one_works(
  opened, address, pictures
):
  upload(opened, pictures / 'broken.jpg')
  (problem,) = every(opened, '#overlay [role=alert]')
  assert problem.text.startswith('broken.jpg cannot be read as a picture')
  assert '/' not in problem.text
  assert table(opened) == {}
  open_page(opened, address)
  assert 'photo.png' in upload(opened, pictures / 'photo.png')


def test_keys_reach_everything(opened):
  """The example is chosen, the opacity set, without a mouse."""
  kinds = {
    'upload': '#picture button',
    'example': '.gallery-item, .gallery button',
    'opacity': SLIDER,
  }
  visited = {}
  for _ in range(12):
    opened.switch_to.active_element.send_keys(Keys.TAB)
    element = opened.switch_to.active_element
    for kind, selector in kinds.items():
      matches = 'return arguments[0].matches(arguments[1])'
      if opened.execute_script(matches, element, selector):
        visited.setdefault(kind, element)
  assert list(visited) == ['upload', 'example', 'opacity']
  visited['example'].send_keys(Keys.ENTER)
  wait(opened, '#legend td')
  assert 'photo.png' in one(opened, '#facts').text


def test_page_follows_the_systems_theme_and_fits_a_phone(
  browser, address, pictures
):
  def brightness(selector, key):
    colour = one(browser, selector).value_of_css_property(key)
    numbers = np.array(re.findall(r'[\d.]+', colour)[:3], float)
    return numbers.mean() * (255 if numbers.max() <= 1 else 1)

  looks = {}
  with on_phone(browser):
    for theme in ('light', 'dark'):
      set_media(browser, theme)
      open_page(browser, address)
      upload(browser, pictures / 'photo.png')
      looks[theme] = (
        brightness('body', 'background-color'),
        brightness('#legend tbody th', 'color'),
      )
    set_media(browser)
    assert 250 < one(browser, '.layers').rect['width'] < 360
  assert looks['light'][0] > 240
  assert looks['light'][1] < 60
  assert looks['dark'][0] < 30
  assert looks['dark'][1] > 200


def test_nothing_is_asked_of_other_hosts(browser, address):
  """Looks at all that the tests above have loaded."""
  open_page(browser, address)
  log = browser.get_log('performance')
  messages = [json.loads(entry['message'])['message'] for entry in log]
  loaded = [
    message['params']['request']['url']
    for message in messages
    if message['method'] == 'Network.requestWillBeSent'
  ]
  assert len(loaded) > 10
  ours = (address, 'data:', f'blob:{address}')
  assert [url for url in loaded if not url.startswith(ours)] == []
  hints = 'link[rel~=preconnect], link[rel~=dns-prefetch]'
  assert every(browser, hints) == []
