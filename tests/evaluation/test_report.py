"""The report of an evaluation, opened in a browser."""

import re

import numpy as np
import pytest
from browser import (
  brightness,
  decoded,
  every,
  on_phone,
  one,
  open_browser,
  set_media,
)
from evaluation import made_up
from evaluation.made_up import EVIL, NAMES, PALETTE, QUOTED
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from resnest_jax import drawing
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.report import page
from resnest_jax.labels import ADE20K

BY_NAME = [EVIL, QUOTED, 'nowhere', 'Sky', 'tree 9', 'tree 10', 'wall']
ARROW = '\N{RIGHTWARDS ARROW}'
SHOWN = """return [...document.querySelectorAll('#class-table tbody tr')]
  .filter(row => row.offsetParent !== null)
  .map(row => row.querySelector('th').textContent)"""


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  """One browser for all tests, with an empty profile."""
  with open_browser(tmp_path_factory.mktemp('profile')) as browser:
    yield browser


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A report of nine images: its path, samples, JSON and confusion matrix."""
  path = tmp_path_factory.mktemp('report') / 'eval' / page.NAME
  samples = made_up.make_samples(9)
  return path, samples, *made_up.write_report(path, samples)


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
  return browser.execute_script(SHOWN)


def headings(browser):
  cells = every(browser, '#class-table thead th')
  return {cell.text.split('\n')[0]: cell for cell in cells}


def sort_by(cell):
  one(cell, 'button').click()


def typed(*words):
  """As the page shows names: without the spaces that HTML collapses."""
  return ' '.join(' '.join(words).split())


def mistakes(confusion):
  return confusion - np.diag(np.diagonal(confusion))


def test_page_is_whole_and_needs_nothing_else(opened, written):
  path, _, result, _ = written
  text = path.read_text('utf-8')
  assert re.findall(r'(?:src|href)=.(?!data:|#)', text) == []
  assert 'http' not in re.sub(r'http-equiv|base64,[^"]*', '', text)
  shown = one(opened, 'body').text
  scores = (
    *(result['mIoU'], result['mAcc'], result['aAcc']),
    *(result['mean'][key] for key in ('Dice', 'Precision', 'Fscore')),
    *(result['mIoU_interval']['low'], result['boundary']['mIoU']),
  )
  assert [x for x in scores if f'{100 * x:.2f}' not in shown] == []
  for fact in ('slide', '48, 64', 'pspnet', '6 of 7', result['checkpoint']):
    assert fact in shown


def test_names_are_text_and_never_run(opened, written):
  assert written[2]['config'] == EVIL
  # The heading, the table, the matrix and the legend; an alert would have
  # been an error of the driver.
  assert one(opened, 'h1').text == EVIL
  assert opened.title.startswith(f'{EVIL}: mIoU ')
  assert set(shown_names(opened)) == set(NAMES)
  legend = [x.text for x in every(opened, '.legend li')]
  assert legend == list(map(typed, NAMES))
  for side in ('rows', 'columns'):
    labels = every(opened, f'.heat .{side} span')
    names = [x.get_attribute('textContent') for x in labels]
    assert names == [x for x in NAMES if x != 'nowhere']
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
  titles = {'F2': 'Fscore', 'Boundary IoU': 'BoundaryIoU', 'Pixels': 'pixels'}
  titles |= {key: key for key in ('IoU', 'Acc', 'Precision', 'Dice')}
  expected = {
    title: [entry[key] for entry in result['per_class']]
    for title, key in titles.items()
  }
  expected['Mostly taken for'] = [
    row.max() / total.sum() if row.any() else None
    for row, total in zip(mistakes(confusion), confusion, strict=True)
  ]
  cells = headings(opened)
  assert list(cells) == [
    *('#', 'Class', 'IoU', 'Acc', 'Precision', 'Dice', 'F2'),
    *('Boundary IoU', 'Pixels', 'Mostly taken for'),
  ]
  for title, values in expected.items():
    defined = [i for i, value in enumerate(values) if value is not None]
    last = [NAMES[i] for i, value in enumerate(values) if value is None]
    for direction, sign in (('ascending', 1), ('descending', -1)):
      sort_by(cells[title])
      order = sorted(defined, key=lambda i: sign * values[i])
      assert shown_names(opened) == [NAMES[i] for i in order] + last
      assert cells[title].get_attribute('aria-sort') == direction
  one(cells['#'], 'button').send_keys(Keys.ENTER)
  assert shown_names(opened) == list(NAMES)
  # The next heading is one tab further.
  opened.switch_to.active_element.send_keys(Keys.TAB)
  opened.switch_to.active_element.send_keys(Keys.SPACE)
  assert shown_names(opened) == BY_NAME


def test_filters_show_the_classes_that_fit(opened):
  box, told = one(opened, '#filter'), one(opened, '#filtered')
  box.send_keys('TREE')
  assert shown_names(opened) == ['tree 10', 'tree 9']
  assert told.text == '2 of 7 classes'
  sort_by(headings(opened)['Class'])
  assert shown_names(opened) == ['tree 9', 'tree 10']
  box.send_keys('s')
  assert shown_names(opened) == []
  box.send_keys(*5 * [Keys.BACKSPACE])
  scored = one(opened, '#scored')
  scored.click()
  assert shown_names(opened) == [x for x in BY_NAME if x != 'nowhere']
  scored.click()
  assert shown_names(opened) == BY_NAME


def test_matrix_tells_its_counts(opened, written):
  confusion = written[3]
  names = [name for name in NAMES if name != 'nowhere']
  places = [NAMES.index(name) for name in names]
  canvas, tip = one(opened, '#heat'), one(opened, '#tip')
  opened.execute_script('arguments[0].scrollIntoView()', canvas)
  cell = float(canvas.get_attribute('data-cell'))
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
    row, column = (typed(names[i]) for i in (r, c))
    assert tip.text.splitlines() == [
      f'{row}, right' if r == c else f'{row} {ARROW} {column}',
      f'ground truth {row}, predicted {column}',
      f'{counted:,} pixels, {100 * share:.2f} % of {row}',
    ]
    # Its pixel: opaque as the root of the share, blue or red.
    red, _, blue, opacity = pixels[r, c]
    assert opacity == pytest.approx(255 * share**0.5, abs=1)
    assert (blue > red) == (r == c)
  # 'Sky' is in no ground truth; the keys go on from where one is.
  ActionChains(opened).move_to_element_with_offset(canvas, 0, 0).perform()
  canvas.send_keys(*6 * [Keys.UP], *6 * [Keys.LEFT], *4 * [Keys.DOWN])
  assert tip.text.splitlines()[2] == '0 pixels, no pixel is Sky'


def test_most_frequent_confusions_are_listed_and_found(opened, written):
  confusion, wrong = written[3], mistakes(written[3])
  r, c = np.unravel_index(wrong.argmax(), wrong.shape)
  buttons = every(opened, '.confusions button')
  share = 100 * wrong[r, c] / confusion[r].sum()
  names = typed(NAMES[r], ARROW, NAMES[c])
  assert buttons[0].text.splitlines()[:2] == [names, f'{share:.1f} %']
  numbers = [int(x.text.split('\n')[2].split()[0]) for x in buttons]
  assert numbers == sorted(wrong.ravel().tolist())[::-1][:16]
  buttons[0].click()
  assert f'{wrong[r, c]:,} pixels, ' in one(opened, '#tip').text


def test_worst_and_best_images_are_shown(opened, written):
  _, samples, _, _ = written
  pairs = [(sample['prediction'], sample['label']) for sample in samples]
  confusions = [metrics.confusion_matrix(*pair, 7) for pair in pairs]
  scores = [metrics.scores(confusion).mIoU for confusion in confusions]
  order = np.argsort(scores)
  shown = [*order[:2], *order[:-3:-1]]
  for article, index in zip(every(opened, 'article'), shown, strict=True):
    sample = samples[index]
    assert sample['name'] in article.text
    assert f'mIoU {100 * scores[index]:.2f}' in article.text
    found = map(decoded, every(article, 'img'))
    drawn = (
      sample['image'],
      drawing.colour(sample['label'], PALETTE),
      drawing.colour(sample['prediction'], PALETTE),
      drawing.error_map(sample['prediction'], sample['label']),
    )
    for i, (seen, picture) in enumerate(zip(found, drawn, strict=True)):
      large = drawing.fit(picture, (480, 640), smooth=i == 0)
      if i:
        np.testing.assert_array_equal(seen, large)
      else:  # A JPEG, of noise.
        assert np.abs(seen.astype(int) - large).mean() < 12


def test_click_enlarges_a_picture_and_keys_go_on(opened):
  images = every(opened, 'figure img')
  large = one(opened, '#viewer-image')
  every(opened, 'figure button')[1].click()
  assert large.get_attribute('src') == images[1].get_attribute('src')
  caption = one(opened, '#viewer-caption').text
  assert caption.endswith(' <b>: ground truth')
  opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
  assert large.get_attribute('src') == images[2].get_attribute('src')
  opened.switch_to.active_element.send_keys(Keys.ESCAPE)
  assert not large.is_displayed()


def test_page_follows_the_systems_theme_and_prints_light(opened):
  for dark, *media in ((True, 'dark'), (False, 'dark', 'print'), (False,)):
    set_media(opened, *media)
    ink = brightness(opened, 'h1', 'color')
    paper = brightness(opened, 'section', 'background-color')
    assert (ink > 200 > 40 > paper) == dark
    assert (ink < 50 < paper == 255) != dark


def test_150_classes_fit_a_phone(browser, tmp_path):
  rng = np.random.default_rng(0)
  confusion = rng.integers(0, 50, (150, 150)) + 5000 * np.eye(150, dtype=int)
  path = tmp_path / page.NAME
  made_up.write_report(path, [], ADE20K.classes, ADE20K.palette, confusion)
  with on_phone(browser):
    open_page(browser, path)
    assert len(shown_names(browser)) == 150
    canvas, names = one(browser, '#heat'), one(browser, '.heat .rows span')
    assert not names.is_displayed()
    # Enlarged, the cells have names.
    one(browser, '#zoom').send_keys(*10 * [Keys.ARROW_RIGHT])
    assert canvas.size['width'] == 13 * 150
    assert names.is_displayed()
  assert browser.get_log('browser') == []


def test_nothing_to_score_is_said(browser, tmp_path):
  for number, message in (
    (0, 'The split has no images'),
    (2, 'No pixel has a label'),
  ):
    samples = made_up.make_samples(number)
    for sample in samples:
      sample['label'][:] = 255
    made_up.write_report(tmp_path / page.NAME, samples)
    open_page(browser, tmp_path / page.NAME)
    shown = one(browser, 'main').text
    assert message in shown
    assert 'nan' not in shown.lower()
    assert 'No pixel was counted.' in shown
    assert every(browser, 'article') == []
    sort_by(headings(browser)['IoU'])
    assert shown_names(browser) == list(NAMES)
    assert browser.get_log('browser') == []
