"""The report of an evaluation, opened in a browser."""

import base64
import re

import cv2
import numpy as np
import pytest
from browser import open_browser
from evaluation.made_up import (
  EVIL,
  NAMES,
  PALETTE,
  QUOTED,
  make_samples,
  write_report,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from resnest_jax.data.labels import ADE20K
from resnest_jax.evaluation import visualize
from resnest_jax.evaluation.report import page

BY_NAME = [EVIL, QUOTED, 'nowhere', 'Sky', 'tree 9', 'tree 10', 'wall']
IMAGES = 9


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  """One browser for all tests, with an empty profile."""
  with open_browser(tmp_path_factory.mktemp('profile')) as browser:
    yield browser


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A report of nine images: its path, samples, JSON and confusion matrix."""
  path = tmp_path_factory.mktemp('report') / 'eval' / page.NAME
  samples = make_samples(IMAGES)
  return path, samples, *write_report(path, samples)


@pytest.fixture
def opened(browser, written):
  """The report, freshly opened; in the end nothing may have gone wrong."""
  open_page(browser, written[0])
  yield browser
  assert browser.get_log('browser') == []


def open_page(browser, path):
  browser.get(path.as_uri())
  # Waits for the pictures, too.
  assert browser.execute_script('return document.readyState') == 'complete'


def shown_names(browser):
  script = """return [...document.querySelectorAll('#class-table tbody tr')]
    .filter(row => row.offsetParent !== null)
    .map(row => row.querySelector('th').textContent)"""
  return browser.execute_script(script)


def headings(browser):
  cells = browser.find_elements(By.CSS_SELECTOR, '#class-table thead th')
  return {cell.text.split('\n')[0]: cell for cell in cells}


def test_page_is_whole_and_needs_nothing_else(opened, written):
  path, _, result, _ = written
  text = path.read_text('utf-8')
  assert re.findall(r'(?:src|href)=.(?!data:|#)', text) == []
  assert 'http' not in re.sub(r'http-equiv|base64,[^"]*', '', text)
  sizes = opened.execute_script(
    'return [...document.images].map(x => [x.complete, x.naturalWidth])'
  )
  assert len(sizes) == 4 * 4 + 1
  assert all(complete and width > 0 for complete, width in sizes)
  # Four times as wide as the image, which the box of 640 by 480 would hold.
  assert sizes[0] == [True, 640]
  shown = opened.find_element(By.TAG_NAME, 'body').text
  for number in (
    *(result[key] for key in ('mIoU', 'mAcc', 'aAcc')),
    *(result['mean'][key] for key in ('Dice', 'Precision', 'Fscore')),
    *(result['mIoU_interval'][key] for key in ('low', 'high')),
    result['boundary']['mIoU'],
  ):
    assert f'{100 * number:.2f}' in shown
  for fact in ('slide', '48, 64', 'pspnet', 'mmseg', '6 of 7'):
    assert fact in shown
  assert result['versions']['jax'] in shown
  assert result['checkpoint'] in shown


def test_names_are_text_and_never_run(opened, written):
  assert written[2]['config'] == EVIL
  # The heading, the table, the matrix and the legend; an alert would have
  # been an error of the driver.
  assert opened.find_element(By.TAG_NAME, 'h1').text == EVIL
  assert opened.title.startswith(f'{EVIL}: mIoU ')
  assert set(shown_names(opened)) == set(NAMES)
  legend = opened.find_elements(By.CSS_SELECTOR, '.legend li')
  assert [x.text for x in legend] == [' '.join(x.split()) for x in NAMES]
  for side in ('rows', 'columns'):
    labels = opened.find_elements(By.CSS_SELECTOR, f'.heat .{side} span')
    names = [x.get_attribute('textContent') for x in labels]
    assert names == [x for x in NAMES if x != 'nowhere']
  assert opened.execute_script('return document.scripts.length') == 2
  # Nor could a script run that got into the page in another way.
  opened.execute_script("""document.body.insertAdjacentHTML('beforeend',
    '<img src="data:," onerror="window.ran = 1">')""")
  assert opened.execute_async_script(
    'setTimeout(arguments[0], 200, window.ran ?? 0)'
  ) == 0  # fmt: skip
  (message,) = opened.get_log('browser')
  assert 'Content Security Policy' in message['message']


def test_click_sorts_both_ways_with_undefined_values_last(opened, written):
  _, _, result, confusion = written
  keys = {
    **{key: key for key in ('IoU', 'Acc', 'Precision', 'Dice')},
    **{'F2': 'Fscore', 'Boundary IoU': 'BoundaryIoU', 'Pixels': 'pixels'},
  }
  expected = {
    title: [entry[key] for entry in result['per_class']]
    for title, key in keys.items()
  }
  wrong = confusion - np.diag(np.diagonal(confusion))
  expected['Mostly taken for'] = [
    row.max() / total.sum() if row.any() else None
    for row, total in zip(wrong, confusion, strict=True)
  ]
  assert expected['IoU'].index(None) == 3
  cells = headings(opened)
  assert list(cells) == ['#', 'Class', *expected]
  assert cells['#'].get_attribute('aria-sort') == 'ascending'
  for title, values in expected.items():
    defined = [i for i, value in enumerate(values) if value is not None]
    last = [NAMES[i] for i, value in enumerate(values) if value is None]
    for direction, sign in (('ascending', 1), ('descending', -1)):
      cells[title].find_element(By.TAG_NAME, 'button').click()
      order = sorted(defined, key=lambda i: sign * values[i])
      assert shown_names(opened) == [NAMES[i] for i in order] + last
      assert cells[title].get_attribute('aria-sort') == direction
    others = [x.get_attribute('aria-sort') for x in cells.values()]
    assert others.count('none') == len(cells) - 1
  cells['Class'].find_element(By.TAG_NAME, 'button').click()
  assert shown_names(opened) == BY_NAME


def test_keyboard_sorts(opened):
  cells = headings(opened)
  cells['#'].find_element(By.TAG_NAME, 'button').send_keys(Keys.ENTER)
  assert shown_names(opened) == list(NAMES[::-1])
  # The next heading is one tab further.
  opened.switch_to.active_element.send_keys(Keys.TAB)
  opened.switch_to.active_element.send_keys(Keys.SPACE)
  assert shown_names(opened) == BY_NAME


def test_filter_shows_the_classes_with_these_letters(opened):
  box = opened.find_element(By.ID, 'filter')
  box.send_keys('TREE')
  assert shown_names(opened) == ['tree 10', 'tree 9']
  assert opened.find_element(By.ID, 'filtered').text == '2 of 7 classes'
  headings(opened)['Class'].find_element(By.TAG_NAME, 'button').click()
  assert shown_names(opened) == ['tree 9', 'tree 10']
  box.send_keys('s')
  assert shown_names(opened) == []
  box.clear()
  box.send_keys('<')
  assert set(shown_names(opened)) == {EVIL, QUOTED}


def test_classes_without_a_score_can_be_left_out(opened, tmp_path):
  box = opened.find_element(By.ID, 'scored')
  assert not box.is_selected()  # Most have one.
  everything = shown_names(opened)
  box.click()
  left = shown_names(opened)
  assert [name for name in everything if name not in left] == ['nowhere']
  assert opened.find_element(By.ID, 'filtered').text == '6 of 7 classes'
  box.click()
  assert shown_names(opened) == everything


def test_matrix_tells_its_counts(opened, written):
  confusion = written[3]
  names = [name for name in NAMES if name != 'nowhere']
  places = [NAMES.index(name) for name in names]
  canvas = opened.find_element(By.ID, 'heat')
  tip = opened.find_element(By.ID, 'tip')
  opened.execute_script('arguments[0].scrollIntoView()', canvas)
  cell = float(canvas.get_attribute('data-cell'))
  assert canvas.size == {'width': 6 * cell, 'height': 6 * cell}
  assert not tip.is_displayed()
  pixels = opened.execute_script(
    'return [...arguments[0].getContext("2d").getImageData(0, 0, 6, 6).data]',
    canvas,
  )
  pixels = np.reshape(pixels, (6, 6, 4))
  for r, c in ((0, 1), (1, 1), (5, 3), (0, 4)):
    x, y = ((i + 0.5 - 3) * cell for i in (c, r))
    ActionChains(opened).move_to_element_with_offset(canvas, x, y).perform()
    counted = confusion[places[r], places[c]]
    share = counted / confusion[places[r]].sum()
    heading, truth, counts = tip.text.splitlines()
    row, column = (' '.join(names[i].split()) for i in (r, c))
    wrong = f'{row} \N{RIGHTWARDS ARROW} {column}'
    assert heading == (f'{row}, right' if r == c else wrong)
    assert truth == f'ground truth {row}, predicted {column}'
    assert counts == f'{counted:,} pixels, {100 * share:.2f} % of {row}'
    # Its pixel: opaque as the root of the share, blue or red.
    red, _, blue, opacity = pixels[r, c]
    assert opacity == pytest.approx(255 * share**0.5, abs=1)
    assert (blue > red) == (r == c)
  # 'Sky' is in no ground truth; the keys go on from where one is.
  ActionChains(opened).move_to_element_with_offset(canvas, 0, 0).perform()
  canvas.send_keys(*6 * [Keys.UP], *6 * [Keys.LEFT], *4 * [Keys.DOWN])
  assert tip.text.splitlines()[2] == '0 pixels, no pixel is Sky'
  canvas.send_keys(Keys.ESCAPE)
  assert not tip.is_displayed()


def test_most_frequent_confusions_are_listed_and_found(opened, written):
  confusion = written[3]
  wrong = confusion - np.diag(np.diagonal(confusion))
  r, c = np.unravel_index(wrong.argmax(), wrong.shape)
  first, *others = opened.find_elements(By.CSS_SELECTOR, '.confusions button')
  assert len(others) == 15
  share = wrong[r, c] / confusion[r].sum()
  assert first.text.splitlines() == [
    ' '.join(f'{NAMES[r]} \N{RIGHTWARDS ARROW} {NAMES[c]}'.split()),
    f'{share:.1%}'.replace('%', ' %'),
    f'{wrong[r, c]:,} pixels',
  ]
  numbers = [int(x.text.split('\n')[2].split()[0]) for x in (first, *others)]
  assert numbers == sorted(wrong.ravel().tolist())[::-1][:16]
  first.click()
  tip = opened.find_element(By.ID, 'tip').text
  assert f'{wrong[r, c]:,} pixels, {100 * share:.2f} %' in tip


def test_worst_and_best_images_are_shown(opened, written):
  _, samples, _, _ = written
  scores = []
  for sample in samples:
    known = sample['label'] != 255
    truth, prediction = sample['label'][known], sample['prediction'][known]
    pairs = [(truth == k, prediction == k) for k in range(7)]
    both = np.array([[(a & b).sum(), (a | b).sum()] for a, b in pairs]).T
    scores.append(np.mean(both[0][both[1] > 0] / both[1][both[1] > 0]))
  order = np.argsort(scores)
  expected = [*order[:2], *order[:-3:-1]]
  articles = opened.find_elements(By.CSS_SELECTOR, 'article')
  kinds = [x.get_attribute('data-kind') for x in articles]
  assert kinds == ['worst', 'worst', 'best', 'best']
  for article, index in zip(articles, expected, strict=True):
    sample = samples[index]
    assert sample['name'] in article.text
    assert f'mIoU {100 * scores[index]:.2f}' in article.text
    found = [
      decoded(image.get_attribute('src'))
      for image in article.find_elements(By.TAG_NAME, 'img')
    ]
    drawn = (
      sample['image'],
      visualize.colour(sample['label'], PALETTE),
      visualize.colour(sample['prediction'], PALETTE),
      visualize.error_map(sample['prediction'], sample['label']),
    )
    for i, (seen, picture) in enumerate(zip(found, drawn, strict=True)):
      large = visualize.fit(picture, (480, 640), smooth=i == 0)
      assert seen.shape == large.shape == (480, 640, 3)
      if i:
        np.testing.assert_array_equal(seen, large)
      else:  # A JPEG, of noise.
        assert np.abs(seen.astype(int) - large).mean() < 12


def decoded(uri):
  """The pixels of a data URI."""
  encoded = base64.b64decode(uri.split(';base64,')[1])
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)


def test_click_enlarges_a_picture_and_keys_go_on(opened, written):
  figures = opened.find_elements(By.CSS_SELECTOR, 'figure')
  images = [x.find_element(By.TAG_NAME, 'img') for x in figures]
  large = opened.find_element(By.ID, 'viewer-image')
  figures[1].find_element(By.TAG_NAME, 'button').click()
  assert large.is_displayed()
  assert large.get_attribute('src') == images[1].get_attribute('src')
  caption = opened.find_element(By.ID, 'viewer-caption')
  assert caption.text.endswith(' <b>: ground truth')
  opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
  assert large.get_attribute('src') == images[2].get_attribute('src')
  opened.switch_to.active_element.send_keys(Keys.ESCAPE)
  assert not large.is_displayed()


def test_page_follows_the_systems_theme_and_prints_light(opened):
  def brightness(**media):
    opened.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
    colours = [
      opened.execute_script(
        'return getComputedStyle(document.querySelector("h1"))'
        '.color.match(/\\d+/g).map(Number)'
      ),
      opened.execute_script(
        'return getComputedStyle(document.querySelector("section"))'
        '.backgroundColor.match(/\\d+/g).map(Number)'
      ),
    ]
    return [sum(colour) / 3 for colour in colours]

  feature = {'name': 'prefers-color-scheme', 'value': 'dark'}
  ink, paper = brightness(features=[feature])
  assert (ink > 200, paper < 40) == (True, True)
  ink, paper = brightness(media='print', features=[feature])
  assert (ink < 50, paper) == (True, 255)
  ink, paper = brightness(media='', features=[])
  assert (ink < 50, paper) == (True, 255)


def test_150_classes_fit_a_phone(browser, tmp_path):
  rng = np.random.default_rng(0)
  confusion = rng.integers(0, 50, (150, 150)) + 5000 * np.eye(150, dtype=int)
  path = tmp_path / page.NAME
  write_report(path, [], ADE20K.classes, ADE20K.palette, confusion)
  size = {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  try:
    open_page(browser, path)
    widths = browser.execute_script(
      'return [document.documentElement.scrollWidth, window.innerWidth]'
    )
    assert widths == [360, 360]
    assert len(shown_names(browser)) == 150
    canvas = browser.find_element(By.ID, 'heat')
    names = browser.find_element(By.CSS_SELECTOR, '.heat .rows span')
    assert canvas.size['width'] == 3 * 150
    assert not names.is_displayed()
    # Enlarged, the cells have names.
    browser.find_element(By.ID, 'zoom').send_keys(*10 * [Keys.ARROW_RIGHT])
    assert canvas.size['width'] == 13 * 150
    assert names.is_displayed()
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
  assert browser.get_log('browser') == []


@pytest.mark.parametrize(
  ('number', 'message'),
  [(0, 'The split has no images'), (2, 'No pixel has a label')],
)
def test_nothing_to_score_is_said(browser, tmp_path, number, message):
  samples = make_samples(number)
  for sample in samples:
    sample['label'][:] = 255
  path = tmp_path / page.NAME
  write_report(path, samples)
  open_page(browser, path)
  shown = browser.find_element(By.TAG_NAME, 'main').text
  assert message in shown
  assert 'nan' not in shown.lower()
  assert 'No pixel was counted.' in shown
  assert shown_names(browser) == list(NAMES)
  assert browser.find_elements(By.TAG_NAME, 'article') == []
  headings(browser)['IoU'].find_element(By.TAG_NAME, 'button').click()
  assert shown_names(browser) == list(NAMES)
  assert browser.get_log('browser') == []
