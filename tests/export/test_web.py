"""The page of an export: served as it is, opened in a browser, cut off."""

import base64
import json
import re
import subprocess
import sys
from urllib.parse import urlsplit

import browser as browsers
import cv2
import numpy as np
import onnxruntime
import pytest
from browser import brightness, every, one, plain
from data.small_archives import decode
from golden.reference import TINY, variables_of
from lengths import others_long
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from weights import built
from weights.built import refused

from resnest_jax.export import folder, web
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights

CANVAS = (72, 96)
NAMES = ['<b>wall</b>', 'a & b', 'x' * 60, 'd', 'e', 'f', 'g']
PALETTE = [[30 * i, 7, 200] for i in range(7)]
SECONDS = 120  # To wait for what a busy machine may take long for.
# Names of other hosts are not found, as where there is no network.
FLAGS = (
  '--disable-gpu',
  '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1',
  *('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'),
)
SWIFTSHADER = (
  *('--enable-unsafe-webgpu', '--enable-features=Vulkan,WebGPU'),
  *('--use-webgpu-adapter=swiftshader', '--use-vulkan=swiftshader'),
  '--ignore-gpu-blocklist',
)
DROP = """const file = new File([Uint8Array.from(arguments[0])], arguments[1]);
const dataTransfer = new DataTransfer();
dataTransfer.items.add(file);
document.body.dispatchEvent(
  new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));"""


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('source') / 'weights'
  config = TINY | {'dtype': 'float32', 'head': 'pspnet'}
  description = Description('segmentor', config)
  more = (NAMES, PALETTE, NORMALIZATION, {'source': 'made up'})
  more += ([96, 64], list(CANVAS))
  about = Weights({}, 'ours', description, *more).about()
  model = description.create()
  return built.written(path, (model, variables_of(model)), 'ours', about)


@pytest.fixture(scope='module')
def page(source, tmp_path_factory):
  """The folder, of a name with spaces; the canvas is the crop by default."""
  out = tmp_path_factory.mktemp('exported') / 'my first export'
  (export,) = folder.export_model(source, out, formats=['web'])
  assert (export.file, export.canvas, export.size) == ('web', True, CANVAS)
  (entry,) = json.loads((out / 'about.json').read_text())['exports']
  assert entry['format'] == 'web'
  card = (out / 'README.md').read_text()
  assert '| web | web | up to 72 high, 96 wide | 100.0000% | 20 drawn' in card
  assert '\n## Run web\n\nIn a browser' in card
  return (out / 'web').rename(out / 'the page')


@pytest.fixture(scope='module')
def address(page):
  """What Python's server calls it."""
  words = '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1'
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
  command = [sys.executable, *words, '--directory', page.parent]
  with subprocess.Popen(command, text=True, **options) as server:
    port = re.search(r'port (\d+)', server.stdout.readline())[1]
    yield f'http://127.0.0.1:{port}/the%20page/'
    server.terminate()


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
  profile, logs = tmp_path_factory.mktemp('profile'), ('browser', 'performance')
  with browsers.open_browser(profile, logs, FLAGS) as driver:
    driver.get('about:blank')
    driver.get_log('performance')  # Of the browser's own start page.
    yield driver


@pytest.fixture
def opened(driver, address):
  """The page with its network; in the end nothing may have gone wrong."""
  driver.get(address)
  wait(driver, '#status', 'The network is ready, on WebAssembly.')
  yield driver
  serious = [x for x in driver.get_log('browser') if x['level'] == 'SEVERE']
  assert serious == []


def wait(driver, selector, start):
  """Until the text of an element has such a start."""

  def text(page):
    told = plain(one(page, selector).text)
    return told.startswith(start) and told

  return WebDriverWait(driver, SECONDS, 0.1).until(text)


def noise(height, width, seed=0):
  """Coarse, so that it has several classes."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
  return small.repeat(9, 0).repeat(9, 1)[:height, :width]


def choose(driver, path):
  """Chooses a file; returns what the page says of it."""
  one(driver, '#file').send_keys(str(path))
  return wait(driver, '#facts', f'{path.name}: ')


def show(driver, folder, picture, name='street.png'):
  Image.fromarray(picture).save(folder / name)
  return choose(driver, folder / name)


def pixels(driver, name):
  """Those of a canvas of the page."""
  script = f"return document.getElementById('{name}').toDataURL()"
  content = driver.execute_script(script).partition(',')[2]
  return decode(base64.b64decode(content), cv2.IMREAD_COLOR_RGB)


def labels(driver):
  """Those whose colours are shown."""
  same = pixels(driver, 'colours')[..., None, :] == np.array(PALETTE)
  assert (same.all(-1).sum(-1) == 1).all()
  return same.all(-1).argmax(-1)


def expected(page, picture):
  """The labels that onnxruntime gives the same file's picture."""
  session = onnxruntime.InferenceSession(page / 'model.onnx')
  height, width = picture.shape[:2]
  images = np.zeros((1, *CANVAS, 3), np.uint8)
  images[0, :height, :width] = picture
  sizes = {'heights': np.int32([height]), 'widths': np.int32([width])}
  (found,) = session.run(None, {'images': images, **sizes})
  return found[0, :height, :width]


@pytest.mark.parametrize('number', others_long([3, 20], 3))
def test_labels_are_those_of_onnxruntime(number, opened, page, tmp_path):
  rng, wrong, classes = np.random.default_rng(number), 0, set()
  sizes = [[rng.integers(1, n + 1) for n in CANVAS] for _ in range(number)]
  sizes[0] = CANVAS
  for seed, size in enumerate(sizes):
    picture = noise(*size, seed)
    told = show(opened, tmp_path, picture, f'{seed}.png')
    height, width = size
    told_size = f'{seed}.png: {width} x {height} pixels. Labelled in '
    assert re.fullmatch(told_size + r'\d+ ms on WebAssembly\.', told)
    np.testing.assert_array_equal(pixels(opened, 'picture'), picture)
    found = labels(opened)
    wrong += (found != expected(page, picture)).sum()
    classes |= {*found.flat}
  assert len(classes) > 2
  assert wrong <= 2  # Two best scores are equal but for rounding.


def test_what_is_larger_is_scaled_down(opened, page, tmp_path):
  told = show(opened, tmp_path, noise(288, 300))
  assert ': 300 x 288 pixels. It is larger than the network takes and' in told
  assert 'was scaled down to 75 x 72. Labelled' in told
  assert wait(opened, '#status', 'Done.').endswith('scaled down to 75 x 72.')
  seen = pixels(opened, 'picture')
  assert seen.shape == (72, 75, 3)
  smaller = cv2.resize(noise(288, 300), (75, 72), interpolation=cv2.INTER_AREA)
  assert np.abs(seen.astype(int) - smaller).mean() < 12
  assert (labels(opened) != expected(page, seen)).sum() <= 1


def test_shares_and_download(opened, page, tmp_path):
  show(opened, tmp_path, noise(50, 70), 'a.b.png')
  found, shares = labels(opened), {}
  for item in every(opened, '#legend li'):
    swatch, name, share = every(item, 'span')
    colour = swatch.value_of_css_property('background-color')
    index = NAMES.index(name.text)
    assert re.findall(r'\d+', colour)[:3] == list(map(str, PALETTE[index]))
    shares[index] = float(share.text.strip('< %'))
  counts = np.bincount(found.ravel(), minlength=7) / found.size * 100
  assert shares == pytest.approx(
    {i: x for i, x in enumerate(counts) if x}, abs=0.1
  )
  assert list(shares.values()) == sorted(shares.values(), reverse=True)
  where = {'behavior': 'allow', 'downloadPath': str(tmp_path)}
  opened.execute_cdp_cmd('Browser.setDownloadBehavior', where)
  one(opened, '#download').click()
  path = tmp_path / 'a.b_labels.png'
  WebDriverWait(opened, SECONDS).until(lambda _: path.exists())
  with Image.open(path) as image:
    assert image.mode == 'P'
    assert np.reshape(image.getpalette(), (-1, 3))[:7].tolist() == PALETTE
    np.testing.assert_array_equal(np.asarray(image), found)


def test_opacity(opened, tmp_path):
  show(opened, tmp_path, noise(50, 70))
  layer, slider = one(opened, '#colours'), one(opened, '#opacity')
  assert layer.value_of_css_property('opacity') == '0.5'
  slider.send_keys(Keys.HOME)
  assert layer.value_of_css_property('opacity') == '0'
  slider.send_keys(Keys.END)
  assert layer.value_of_css_property('opacity') == '1'
  assert one(opened, '#percent').text == '100 %'


def test_pictures_are_dropped_and_a_broken_one_is_told(opened, tmp_path):
  Image.fromarray(noise(40, 30)).save(tmp_path / 'a.png')
  content = list((tmp_path / 'a.png').read_bytes())
  opened.execute_script(DROP, content[:99], '<b>.png')
  told = wait(opened, '#problem', '<b>.png could not be labelled: ')
  assert 'decoded' in told
  assert not one(opened, '#result').is_displayed()
  opened.execute_script(DROP, content, 'a.png')
  wait(opened, '#facts', 'a.png: 30 x 40 pixels. Labelled in ')
  assert not one(opened, '#problem').is_displayed()


def test_of_transparent_pictures_the_colours_count(opened, tmp_path):
  colour = np.uint8([200, 100, 50, 90])
  picture = np.broadcast_to(colour, (40, 30, 4))
  Image.fromarray(picture).save(tmp_path / 'a.png')
  content = list((tmp_path / 'a.png').read_bytes())
  opened.execute_script(DROP, content, 'a.png')
  wait(opened, '#facts', 'a.png: 30 x 40 pixels. Labelled in ')
  seen = pixels(opened, 'picture').reshape(-1, 3)
  # Browsers keep products with the opacity, in 8 bits.
  assert np.abs(seen - colour[:3].astype(int)).max() <= 2


def test_camera(opened):
  button = one(opened, '#camera')
  button.click()
  told = wait(opened, '#facts', 'Camera: 640 x 480 pixels. It is larger')
  assert 'scaled down to 96 x 72' in told
  first = pixels(opened, 'picture')
  WebDriverWait(opened, SECONDS).until(
    lambda _: (pixels(opened, 'picture') != first).any()
  )
  assert one(opened, '#status').text == 'The camera is on.'
  assert button.text == 'Stop the camera'
  button.click()
  wait(opened, '#status', 'The camera is off.')
  assert button.text == 'Use the camera'
  assert every(opened, '#legend li')


CONTROLS = {
  'file': ('File', None),
  'camera': ('Use the camera', 'button'),
  'opacity': ('Opacity of the colours', 'slider'),
  'download': ('Download the label map', 'button'),
}


def test_keys_reach_everything_and_it_has_a_name(opened, tmp_path):
  for name, (told, role) in CONTROLS.items():
    # Not sent to an element: a file's input takes text for a path.
    ActionChains(opened).send_keys(Keys.TAB).perform()
    element = opened.switch_to.active_element
    assert element.get_attribute('id') == name
    assert element.accessible_name.startswith(told)
    assert role in (None, element.aria_role)
    if name == 'file':  # The others wait for a label map.
      show(opened, tmp_path, noise(40, 30))
  controls = every(opened, 'a, button, input, select, [tabindex]')
  assert len(controls) == len(CONTROLS)
  picture = one(opened, '#picture')
  assert picture.accessible_name.startswith('street.png; its classes are')
  assert picture.aria_role in ('img', 'image')
  assert one(opened, '#status').aria_role == 'status'
  assert one(opened, '#problem').get_attribute('role') == 'alert'
  headings = [x.text for x in every(opened, 'h1, h2, h3')]
  titles = ['Semantic segmentation', 'Picture', 'Label map']
  assert headings == [*titles, 'Classes by their share of the pixels']


@pytest.mark.parametrize('width', [320, 360])
def test_page_has_the_systems_theme_on_a_phone(width, opened, tmp_path):
  with browsers.on_phone(opened, width):
    show(opened, tmp_path, noise(72, 96))
    for theme in ('light', 'dark'):
      browsers.set_media(opened, theme)
      paper = brightness(opened, 'section', 'background-color')
      ink = brightness(opened, '#legend', 'color')
      assert (paper > 240, ink < 60) == 2 * (theme == 'light',)
      assert (paper < 40, ink > 200) == 2 * (theme == 'dark',)
    browsers.set_media(opened)


def test_without_a_network(opened, tmp_path):
  """Once it is loaded it does not even need its server."""
  conditions = {'offline': True, 'latency': 0}
  conditions |= dict.fromkeys(('downloadThroughput', 'uploadThroughput'), -1)
  opened.execute_cdp_cmd('Network.emulateNetworkConditions', conditions)
  try:
    show(opened, tmp_path, noise(40, 30), 'alone.png')
  finally:
    conditions['offline'] = False
    opened.execute_cdp_cmd('Network.emulateNetworkConditions', conditions)


def test_without_a_server_it_says_what_to_do(driver, page):
  driver.get((page / 'index.html').as_uri())
  wait(driver, '#problem', 'The network could not be started. The page needs')
  assert 'python -m http.server' in one(driver, '#problem').text
  driver.get_log('browser')


def test_nothing_is_asked_of_other_hosts(driver, address, page):
  """Looks at all that the tests above have loaded, and at all that could be."""
  driver.get(address)
  log = [json.loads(x['message']) for x in driver.get_log('performance')]
  events = [entry['message'] for entry in log]
  asked = [x for x in events if x['method'] == 'Network.requestWillBeSent']
  loaded = [urlsplit(x['params']['request']['url']) for x in asked]
  host = urlsplit(address).netloc
  assert {x.scheme for x in loaded} - {'blob', 'data', 'file'} == {'http'}
  assert {x.netloc for x in loaded if x.scheme == 'http'} == {host}
  texts = [x for x in page.rglob('*') if x.suffix in ('.html', '.css', '.js')]
  assert len(texts) == 6
  text = ''.join(x.read_text('utf-8') for x in texts)
  # In a message of the runtime.
  guide = 'https://web.dev/cross-origin-isolation-guide/'
  assert {*re.findall(r'\w+://[^\s"\'`)]+', text)} == {guide}


@pytest.mark.long
def test_on_webgpu(address, page, tmp_path):
  """By a driver that computes on the CPU, as graphics cards are rare."""
  with browsers.open_browser(tmp_path / 'profile', flags=SWIFTSHADER) as driver:
    driver.get(address)
    wait(driver, '#status', 'The network is ready, on WebGPU.')
    wrong = 0
    for seed in range(3):
      picture = noise(70 - seed, 90, seed)
      told = show(driver, tmp_path, picture, f'{seed}.png')
      assert told.endswith('ms on WebGPU.')
      wrong += (labels(driver) != expected(page, picture)).sum()
    assert wrong <= 2
    driver.get(f'{address}?wasm')
    wait(driver, '#status', 'The network is ready, on WebAssembly.')
    assert driver.get_log('browser') == []


OPTIONS = (
  ({'probabilities': True, 'formats': ['onnx', 'web']}, 'give --canvas one'),
  ({'canvas': [(64, 64), (32, 32)]}, 'a page shows labels of one canvas'),
  ({'canvas': ['free']}, 'a page shows labels of one canvas'),
  ({'sizes': [(64, 64)]}, '--sizes out, or web out of --formats'),
  ({'features': 16}, 'features are written as StableHLO and ONNX alone'),
)


@pytest.mark.parametrize(('options', 'message'), OPTIONS)
def test_what_has_no_page(options, message, source, tmp_path):
  given = source, tmp_path / 'out'
  options = {'formats': ['web']} | options
  refused(message, folder.export_model, *given, **options)
  assert not (tmp_path / 'out').exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Empty, and so is the PATH."""
  monkeypatch.setenv('RESNEST_JAX_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'bin').mkdir()
  monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
  return tmp_path / 'cache'


def write_npm(cache, script):
  path = cache.with_name('bin') / 'npm'
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(0o755)


def test_a_runtime_that_cannot_be_had(cache, monkeypatch):
  put = rf'`npm pack onnxruntime-web@1\.30\.0` writes it .* put it at {cache}'
  refused(f'there is no npm. Install npm, .*{put}', web.fetch_runtime)
  write_npm(cache, 'echo E404 not found >&2; exit 1')
  refused(f'and npm failed: E404 not found.* {put}', web.fetch_runtime)
  write_npm(cache, f'echo other >{web.ARCHIVE}')
  refused(r'\.tgz has the SHA-256 \w{64}, not .* Remove it', web.fetch_runtime)
  (file,) = cache.iterdir()
  file.unlink()
  monkeypatch.setenv('RESNEST_JAX_OFFLINE', '1')
  refused('downloads are switched off', web.fetch_runtime)


def test_a_cached_runtime_is_checked(cache):
  cache.mkdir()
  (cache / web.ARCHIVE).write_bytes(b'cut off')
  told = 'Remove it to fetch it again'
  refused(rf'1\.30\.0\.tgz has the SHA-256 .* {told}', web.fetch_runtime)
