"""The report of an evaluation, opened in a browser."""

import re
import types

import browser
import numpy as np
import pytest
from browser import every, one
from evaluation.plain import noise
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from resnest_jax import drawing
from resnest_jax.config import load_config
from resnest_jax.evaluation import (
  evaluate,
  evaluate_split,
  metrics,
  ranked_images,
  segmentation,
)
from resnest_jax.evaluation.boundary import BoundaryIoU
from resnest_jax.evaluation.report import page
from resnest_jax.labels import ADE20K

EVIL = '<script>alert(1)</script>'
QUOTED = 'a & "b" \'c\' $d </td>'
# 'nowhere' is neither labelled nor predicted, 'Sky' is predicted only.
NAMES = ('wall', EVIL, 'tree 10', 'nowhere', QUOTED, 'Sky', 'tree 9')
PALETTE = ADE20K.palette[: len(NAMES)]
BY_NAME = [EVIL, QUOTED, 'nowhere', 'Sky', 'tree 9', 'tree 10', 'wall']
OCCURRING = [name for name in NAMES if name != 'nowhere']
ARROW = '\N{RIGHTWARDS ARROW}'
# Bins without a pixel, and others.
BINS = 10 * [{'count': 0, 'confidence': None, 'accuracy': None}]
BINS += [
  {'count': 40 + i, 'confidence': (i + 10.5) / 15, 'accuracy': i / 4}
  for i in range(5)
]
ERRORS = {'ECE': 0.0812, 'NLL': 0.5, 'bins': BINS}
CALIBRATION = {'temperature': 1.7, 'before': ERRORS, 'after': ERRORS}
SHOWN = """return [...document.querySelectorAll('#class-table tbody tr')]
  .filter(row => row.offsetParent !== null)
  .map(row => row.querySelector('th').textContent)"""


def make_samples(number):
  # Images with labels and predictions; the later, the more is right.
  rng, samples = np.random.default_rng(0), noise(number, (18, 24), (18, 24))
  samples.labels = types.SimpleNamespace(classes=NAMES, palette=PALETTE)
  for i, sample in enumerate(samples):
    label = np.uint8([0, 1, 2, 4, 6, 255, 255])[sample['label']]
    other = np.uint8(rng.choice([0, 1, 2, 4, 5, 6], label.shape))
    wrong = (rng.random(label.shape) > i / number) | (label == 255)
    sample |= {'name': f'folder/"{i}" <b>', 'label': label}
    sample['prediction'] = np.where(wrong, other, label)
  return samples


def write_report(out, samples):
  # As `evaluate_split` does; returns its JSON and the confusion matrix.
  options = {'name': EVIL, 'eval.fscore_beta': 2.0}
  config = load_config('configs/ade20k_pspnet.py', options)
  names, ranked = samples.labels.classes, ranked_images.RankedImages(2)
  batches = [
    {key: np.array([value]) for key, value in sample.items()}
    | {'index': [i], 'label_size': [sample['label'].shape]}
    for i, sample in enumerate(samples)
  ]

  def step(_, batch):
    pair = batch['prediction'], batch['label']
    return pair[0], [metrics.confusion_matrix(*pair, len(names))]

  with BoundaryIoU(len(names)) as boundary:
    task = segmentation.Segmentation(names, fscore_beta=2.0)
    look = {'on_image': lambda x: (ranked.add(x), boundary.add(x))}
    found = evaluate.evaluate(step, None, batches, task, len(batches), **look)
    outlines = boundary.scores()
  result = {
    'config': config.name,
    'checkpoint': '/runs/"<i>&\'/checkpoints/7',
    'model': config.model.to_dict(),
    'data': {'name': 'folder', 'split': 'val'},
    'protocol': {'name': 'slide', 'crop': [48, 64], 'stride': [32, 42]},
    'calibration': CALIBRATION,
    **evaluate_split.summarize(config, samples, found, ranked, outlines, 8),
  }
  missing = []
  evaluate_split.draw(samples, found, ranked, out, result, [], missing)
  assert missing == []
  return result, found.confusion


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
  with browser.open_browser(tmp_path_factory.mktemp('profile')) as driver:
    yield driver


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  # A report of nine images: its folder, samples, JSON and confusion matrix.
  out, samples = tmp_path_factory.mktemp('report') / 'eval', make_samples(9)
  return out, samples, *write_report(out, samples)


@pytest.fixture
def opened(driver, written):
  # In the end nothing may have gone wrong.
  open_page(driver, written[0])
  yield driver
  assert driver.get_log('browser') == []


def open_page(driver, folder):
  driver.get((folder / page.NAME).as_uri())
  # Waits for the pictures, too.
  assert driver.execute_script('return document.readyState') == 'complete'


def headings(driver):
  cells = every(driver, '#class-table thead th')
  return {cell.text.split('\n')[0]: cell for cell in cells}


def typed(*words):
  # As the page shows names: without the spaces that HTML collapses.
  return ' '.join(' '.join(words).split())


def test_page_is_whole_and_needs_nothing_else(opened, written):
  out, _, result, _ = written
  assert result['classes_absent'] == ['nowhere', 'Sky']
  text = (out / page.NAME).read_text('utf-8')
  assert re.findall(r'(?:src|href)=.(?!data:|#)', text) == []
  assert 'http' not in re.sub(r'http-equiv|base64,[^"]*', '', text)
  shown = one(opened, 'body').text
  scores = [result[key] for key in ('mIoU', 'mAcc', 'aAcc')]
  scores += [result['mean'][key] for key in ('Dice', 'Precision', 'Fscore')]
  scores += [result['mIoU_interval']['low'], result['boundary']['mIoU']]
  facts = ['slide', '48, 64', 'pspnet', '6 of 7', result['checkpoint']]
  facts += [f'{100 * score:.2f}' for score in scores]
  assert [fact for fact in facts if fact not in shown] == []


def test_names_are_text_and_never_run(opened):
  # The heading, the table, the matrix and the legend; an alert would have
  # been an error of the driver.
  assert one(opened, 'h1').text == EVIL
  assert opened.title.startswith(f'{EVIL}: mIoU ')
  assert opened.execute_script(SHOWN) == list(NAMES)
  assert [x.text for x in every(opened, '.legend li')] == [*map(typed, NAMES)]
  for side in ('rows', 'columns'):
    labels = every(opened, f'.heat .{side} span')
    assert [x.get_attribute('textContent') for x in labels] == OCCURRING
  assert opened.execute_script('return document.scripts.length') == 2
  # Nor could a script run that got into the page in another way.
  opened.execute_script("""document.body.insertAdjacentHTML('beforeend',
    '<img src="data:," onerror="window.ran = 1">')""")
  ran = 'setTimeout(arguments[0], 200, window.ran ?? 0)'
  assert opened.execute_async_script(ran) == 0
  (message,) = opened.get_log('browser')
  assert 'Content Security Policy' in message['message']


def test_clicks_and_keys_sort_with_undefined_values_last(opened, written):
  _, _, result, confusion = written
  keys = {'F2': 'Fscore', 'Boundary IoU': 'BoundaryIoU', 'Pixels': 'pixels'}
  keys |= {key: key for key in ('IoU', 'Acc', 'Precision', 'Dice')}
  expected = {k: [x[v] for x in result['per_class']] for k, v in keys.items()}
  wrong = confusion - np.diag(np.diagonal(confusion))
  shares = wrong.max(1) / confusion.sum(1).clip(1)
  expected['Mostly taken for'] = [share or None for share in shares.tolist()]
  cells = headings(opened)
  titles = ['#', 'Class', 'IoU', 'Acc', 'Precision', 'Dice', 'F2']
  titles += ['Boundary IoU', 'Pixels', 'Mostly taken for']
  assert list(cells) == titles
  for title, values in expected.items():
    values = dict(zip(NAMES, values, strict=True))
    last = [name for name in NAMES if values[name] is None]
    defined = [name for name in NAMES if name not in last]
    for direction, sign in (('ascending', 1), ('descending', -1)):
      one(cells[title], 'button').click()
      order = sorted(defined, key=lambda name: sign * values[name])
      assert opened.execute_script(SHOWN) == order + last
      assert cells[title].get_attribute('aria-sort') == direction
  one(cells['#'], 'button').send_keys(Keys.ENTER)
  assert opened.execute_script(SHOWN) == list(NAMES)
  # The next heading is one tab further.
  opened.switch_to.active_element.send_keys(Keys.TAB)
  opened.switch_to.active_element.send_keys(Keys.SPACE)
  assert opened.execute_script(SHOWN) == BY_NAME


def test_filters_show_the_classes_that_fit(opened):
  box, scored = one(opened, '#filter'), one(opened, '#scored')
  box.send_keys('TREE')
  assert opened.execute_script(SHOWN) == ['tree 10', 'tree 9']
  assert one(opened, '#filtered').text == '2 of 7 classes'
  one(headings(opened)['Class'], 'button').click()
  assert opened.execute_script(SHOWN) == ['tree 9', 'tree 10']
  box.send_keys('s')
  assert opened.execute_script(SHOWN) == []
  box.send_keys(*5 * [Keys.BACKSPACE])
  scored.click()
  assert opened.execute_script(SHOWN) == [x for x in BY_NAME if x in OCCURRING]
  scored.click()
  assert opened.execute_script(SHOWN) == BY_NAME


def test_matrix_tells_its_counts(opened, written):
  places = [NAMES.index(name) for name in OCCURRING]
  confusion = written[3][np.ix_(places, places)]
  canvas, tip = one(opened, '#heat'), one(opened, '#tip')
  opened.execute_script('arguments[0].scrollIntoView()', canvas)
  cell = float(canvas.get_attribute('data-cell'))
  assert not tip.is_displayed()
  js = 'return [...arguments[0].getContext("2d").getImageData(0, 0, 6, 6).data]'
  pixels = np.reshape(opened.execute_script(js, canvas), (6, 6, 4))
  for r, c in ((0, 1), (1, 1), (5, 3), (0, 4)):
    x, y = ((i + 0.5 - 3) * cell for i in (c, r))
    ActionChains(opened).move_to_element_with_offset(canvas, x, y).perform()
    share = confusion[r, c] / confusion[r].sum()
    row, column = (typed(OCCURRING[i]) for i in (r, c))
    assert tip.text.splitlines() == [
      f'{row}, right' if r == c else f'{row} {ARROW} {column}',
      f'ground truth {row}, predicted {column}',
      f'{confusion[r, c]:,} pixels, {100 * share:.2f} % of {row}',
    ]
    # Its pixel: opaque as the root of the share, blue or red.
    red, _, blue, opacity = pixels[r, c]
    assert opacity == pytest.approx(255 * share**0.5, abs=1)
    assert (blue > red) == (r == c)
  # 'Sky' is in no ground truth; the keys go on from where one is.
  ActionChains(opened).move_to_element_with_offset(canvas, 0, 0).perform()
  canvas.send_keys(*6 * [Keys.UP], *6 * [Keys.LEFT], *4 * [Keys.DOWN])
  assert tip.text.splitlines()[2] == '0 pixels, no pixel is Sky'


def test_reliability_has_a_bar_of_each_bin_with_pixels(opened):
  bars = every(opened, '.diagrams rect')
  heights = [float(x.get_attribute('height')) for x in bars]
  assert heights == 2 * [0, 25, 50, 75, 100]
  told = one(bars[1], 'title').get_attribute('textContent')
  assert (
    told == '41 pixels of mean probability 76.67, of which 25.00 % are right'
  )
  left, right = every(opened, '.diagrams svg')
  assert left.size == right.size
  assert left.size['width'] == left.size['height']
  shown = one(opened, '#calibration').text
  assert shown.count('ECE 8.12, NLL 0.5000') == 2
  assert 'the temperature 1.7 have' in shown


def test_most_frequent_confusions_are_listed_and_found(opened, written):
  confusion = written[3]
  wrong = confusion - np.diag(np.diagonal(confusion))
  r, c = np.unravel_index(wrong.argmax(), wrong.shape)
  buttons = every(opened, '.confusions button')
  share = 100 * wrong[r, c] / confusion[r].sum()
  names = typed(NAMES[r], ARROW, NAMES[c])
  assert buttons[0].text.splitlines()[:2] == [names, f'{wrong[r, c]:,} pixels']
  assert f'{share:.1f} % of' in buttons[0].text
  numbers = [int(x.text.split('\n')[1].split()[0]) for x in buttons]
  assert numbers == sorted(wrong.ravel().tolist())[::-1][:16]
  buttons[0].click()
  assert f'{wrong[r, c]:,} pixels, ' in one(opened, '#tip').text


def test_worst_and_best_images_are_shown(opened, written):
  def score(sample):
    pair = sample['prediction'], sample['label']
    return metrics.scores(metrics.confusion_matrix(*pair, 7)).mIoU

  order = sorted(written[1], key=score)
  shown = [*order[:2], *order[:-3:-1]]
  for article, sample in zip(every(opened, 'article'), shown, strict=True):
    assert sample['name'] in article.text
    assert f'mIoU {100 * score(sample):.2f}' in article.text
    image, *maps = map(browser.decoded, every(article, 'img'))
    drawn = (
      drawing.colour(sample['label'], PALETTE),
      drawing.colour(sample['prediction'], PALETTE),
      drawing.error_map(sample['prediction'], sample['label']),
    )
    for seen, picture in zip(maps, drawn, strict=True):
      np.testing.assert_array_equal(seen, drawing.fit(picture, (480, 640)))
    # A JPEG, of noise.
    large = drawing.fit(sample['image'], (480, 640), smooth=True)
    assert np.abs(image.astype(int) - large).mean() < 12


def test_click_enlarges_a_picture_and_keys_go_on(opened):
  images = every(opened, 'figure img')
  large = one(opened, '#viewer-image')
  every(opened, 'figure button')[1].click()
  assert large.get_attribute('src') == images[1].get_attribute('src')
  assert one(opened, '#viewer-caption').text.endswith(' <b>: ground truth')
  opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
  assert large.get_attribute('src') == images[2].get_attribute('src')
  opened.switch_to.active_element.send_keys(Keys.ESCAPE)
  assert not large.is_displayed()


def test_page_follows_the_systems_theme_and_prints_light(opened):
  for dark, *media in ((True, 'dark'), (False, 'dark', 'print'), (False,)):
    browser.set_media(opened, *media)
    ink = browser.brightness(opened, 'h1', 'color')
    paper = browser.brightness(opened, 'section', 'background-color')
    assert (ink > 200 > 40 > paper) == dark
    assert (ink < 50 < paper == 255) != dark


def test_150_classes_fit_a_phone(opened, tmp_path):
  maps = np.random.default_rng(0).integers(0, 150, (2, 200, 200), np.uint8)
  samples = make_samples(1)
  samples.labels = ADE20K
  samples[0] |= {'label': maps[0], 'prediction': maps[1]}
  write_report(tmp_path, samples)
  with browser.on_phone(opened):
    open_page(opened, tmp_path)
    assert len(opened.execute_script(SHOWN)) == 150
    canvas, names = one(opened, '#heat'), one(opened, '.heat .rows span')
    assert not names.is_displayed()
    # Enlarged, the cells have names.
    one(opened, '#zoom').send_keys(*10 * [Keys.ARROW_RIGHT])
    assert canvas.size['width'] == 13 * 150
    assert names.is_displayed()


NOTHING = {0: 'The split has no images', 2: 'No pixel has a label'}


@pytest.mark.parametrize(('number', 'message'), NOTHING.items())
def test_nothing_to_score_is_said(opened, tmp_path, number, message):
  samples = make_samples(number)
  for sample in samples:
    sample['label'][:] = 255
  write_report(tmp_path, samples)
  open_page(opened, tmp_path)
  shown = one(opened, 'main').text
  assert message in shown
  assert 'nan' not in shown.lower()
  assert 'No pixel was counted.' in shown
  assert every(opened, 'article') == []
  one(headings(opened)['IoU'], 'button').click()
  assert opened.execute_script(SHOWN) == list(NAMES)
