"""The page to try a network, opened in a browser."""

import json
import os
import re
import signal
import socket

import browser as browsers
import cv2
import numpy as np
import pytest
from browser import brightness, decoded, every, one, plain
from data.small_archives import decode
from evaluation.drawn import smooth_picture
from hosts import finish, start
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from resnest_jax import from_checkpoint
from resnest_jax.labels import ADE20K

pytestmark = pytest.mark.long

SECONDS = 120  # To wait for what a busy machine may take long for.
ODD = os.fsdecode(b'[x] \xdf.png')
EVIL = '<b>evil & "co".jpg'
UPLOAD = '#picture input[type=file]'
SLIDER = '#opacity input[type=range]'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder with a picture, a turned one of an evil name, a broken one."""
  folder = tmp_path_factory.mktemp('pictures')
  photo = Image.fromarray(smooth_picture())
  photo.save(folder / 'photo.png')
  photo.save(folder / ODD)
  turned = Image.Exif()
  turned[0x0112] = 6  # To be turned clockwise.
  photo.save(folder / EVIL, exif=turned)
  (folder / 'broken.jpg').write_bytes((folder / EVIL).read_bytes()[:99])
  return folder


@pytest.fixture(scope='module')
def address(written_run, pictures, tmp_path_factory):
  """The page, served by the command, until Ctrl-C."""
  uploads = tmp_path_factory.mktemp('uploads')
  with socket.create_server(('127.0.0.1', 0)) as proxy:
    to_proxy = f'http://127.0.0.1:{proxy.getsockname()[1]}'
    variables = {'HTTP_PROXY': to_proxy, 'HTTPS_PROXY': to_proxy}
    variables |= {'NO_PROXY': '127.0.0.1,localhost', 'TMPDIR': str(uploads)}
    flags = ('--weights', written_run, '--checkpoint', 7, '--port', 0)
    flags += ('--examples', pictures / 'photo.png', pictures / ODD)
    process = start('-m', 'resnest_jax.demo', *flags, devices=1, **variables)
    page = re.compile(r'the page is at (http://127\.0\.0\.1:\d+/)')
    found = next(filter(None, map(page.search, process.stdout)), None)
    assert found, finish(process)
    yield found[1]
    assert list(uploads.iterdir()) != []
    # As schedulers do; Ctrl-C goes the same way.
    process.send_signal(signal.SIGTERM)
    assert finish(process, 128 + signal.SIGTERM, SECONDS) == ('', '')
    assert list(uploads.glob('resnest_jax_demo_*')) == []
    # Nothing has asked the proxy for other hosts.
    proxy.setblocking(False)
    with pytest.raises(BlockingIOError):
      proxy.accept()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  profile = tmp_path_factory.mktemp('profile')
  with browsers.open_browser(profile, ('browser', 'performance')) as browser:
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


def test_a_picture_gets_its_classes(opened, written_run, pictures):
  facts = upload(opened, pictures / 'photo.png')
  assert 'photo.png: 120 x 90 pixels.' in facts
  assert re.search(r'256 x 256, for (\d+ ms|\d+\.\d s) on 1 x cpu', facts)
  expected = from_checkpoint(written_run).predict(pictures / 'photo.png')
  colours = decoded(one(opened, '.layers .colours'))
  # Another padded shape rounds otherwise.
  assert (colours == expected.colors()).all(-1).mean() > 0.999
  assert len(np.unique(expected.labels)) > 1
  # A JPEG.
  assert np.abs(photograph(opened) - expected.image).mean() < 3
  # The table counts the pixels that are shown.
  rows = every(opened, '#legend tbody tr')
  assert rows
  for row in rows:
    written = one(row, '.swatch').value_of_css_property('background-color')
    colour = ADE20K.palette[ADE20K.classes.index(one(row, 'th').text)]
    assert re.findall(r'\d+', written)[:3] == list(map(str, colour))
    share = float(one(row, '.share').text.strip('< %'))
    counted = 100 * (colours == colour).all(-1).mean()
    assert share == pytest.approx(counted, abs=0.1)


def test_the_slider_sets_the_opacity(opened, pictures):
  upload(opened, pictures / 'photo.png')
  layers, layer = one(opened, '.layers'), one(opened, '.layers .colours')
  assert layer.value_of_css_property('opacity') == '0.5'
  ends = (Keys.END, '1', decoded(layer)), (Keys.HOME, '0', photograph(opened))
  for key, opacity, picture in ends:
    one(opened, SLIDER).send_keys(key)
    wait(opened, f'html[style*="--opacity: {opacity};"]')
    assert layer.value_of_css_property('opacity') == opacity
    looks = decode(layers.screenshot_as_png, cv2.IMREAD_COLOR_RGB)
    looks = cv2.resize(looks, (120, 90), interpolation=cv2.INTER_AREA)
    # Without borders of classes and the round corners.
    difference = np.abs(looks.astype(int) - picture)
    assert np.median(difference, axis=(0, 1)).max() < 8


def test_pictures_are_upright_and_names_are_text(opened, pictures):
  assert ': 90 x 120 pixels' in upload(opened, pictures / EVIL)
  assert every(opened, '#facts b') == []
  upright = np.rot90(smooth_picture(), -1)
  assert np.abs(photograph(opened) - upright).mean() < 5


def test_after_a_broken_file_the_next_works(opened, address, pictures):
  upload(opened, pictures / 'broken.jpg')
  (problem,) = every(opened, '#overlay [role=alert]')
  assert problem.text.startswith('broken.jpg cannot be decoded')
  assert '/' not in problem.text
  assert every(opened, '#legend td') == []
  open_page(opened, address)
  assert 'photo.png' in upload(opened, pictures / 'photo.png')


def test_keys_reach_everything(opened):
  """The example is chosen, the opacity set, without a mouse."""
  example = '.gallery-item, .gallery button'
  kinds = ['#picture button', example, SLIDER]
  visited, matches = {}, 'return arguments[0].matches(arguments[1])'
  for _ in range(12):
    opened.switch_to.active_element.send_keys(Keys.TAB)
    element = opened.switch_to.active_element
    for kind in kinds:
      if opened.execute_script(matches, element, kind):
        visited.setdefault(kind, element)
  assert list(visited) == kinds
  visited[example].send_keys(Keys.ENTER)
  wait(opened, '#legend td')
  assert 'photo.png' in one(opened, '#facts').text


def test_page_has_the_systems_theme_on_a_phone(browser, address, pictures):
  with browsers.on_phone(browser):
    for theme in ('light', 'dark'):
      browsers.set_media(browser, theme)
      open_page(browser, address)
      upload(browser, pictures / 'photo.png')
      paper = brightness(browser, 'body', 'background-color')
      ink = brightness(browser, '#legend tbody th', 'color')
      assert (paper > 240, ink < 60) == 2 * (theme == 'light',)
      assert (paper < 30, ink > 200) == 2 * (theme == 'dark',)
    browsers.set_media(browser)
    assert 250 < one(browser, '.layers').rect['width'] < 360


def test_nothing_is_asked_of_other_hosts(browser, address):
  """Looks at all that the tests above have loaded."""
  open_page(browser, address)
  log = [json.loads(x['message']) for x in browser.get_log('performance')]
  events = [entry['message'] for entry in log]
  asked = [x for x in events if x['method'] == 'Network.requestWillBeSent']
  loaded = [x['params']['request']['url'] for x in asked]
  assert len(loaded) > 10
  ours = (address, 'data:', f'blob:{address}')
  assert [url for url in loaded if not url.startswith(ours)] == []
  assert every(browser, 'link[rel~=preconnect], link[rel~=dns-prefetch]') == []
