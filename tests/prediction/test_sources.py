"""Which files are meant, and how those that are written are called."""

from pathlib import Path

import pytest
from trouble import obeying_permissions

from resnest_jax.errors import UserError
from resnest_jax.files import temporary_path
from resnest_jax.prediction import sources
from resnest_jax.prediction.sources import Source, find_sources


def touch(folder, *names):
  for path in map(folder.joinpath, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def trip(tmp_path, monkeypatch):
  """A folder with sub folders; the process works in the one around it."""
  folder = tmp_path / 'trip'
  touch(folder, 'a.jpg', 'b.MP4', 'notes.txt', '.hidden.jpg')
  touch(folder, 'day 1/a.jpg', 'day 1/late/c.webm', 'day 2/a.jpg')
  monkeypatch.chdir(tmp_path)
  return folder


def found(*given, **options):
  every = find_sources(given, **options)
  return [(str(each.path), each.folder.as_posix()) for each in every]


def masks(every):
  named = sources.with_files(every, ['masks'])
  return [each.files['masks'].as_posix() for each in named]


FLAT = [('trip/a.jpg', '.'), ('trip/b.MP4', '.')]
FIRST, SECOND = ('trip/day 1/a.jpg', 'day 1'), ('trip/day 2/a.jpg', 'day 2')


def test_folders_with_and_without_their_sub_folders(trip):
  assert found('trip') == FLAT
  assert found('trip', 'trip/a.jpg', trip / '..' / 'trip') == FLAT
  everything = [*FLAT, FIRST, ('trip/day 1/late/c.webm', 'day 1/late'), SECOND]
  assert found('trip', recursive=True) == everything
  # Files in the output folder are no input.
  touch(trip, 'out/a.png')
  assert found('trip', recursive=True, out=Path('trip/out')) == everything
  assert found('trip/out', out=Path('trip/out')) == [('trip/out/a.png', '.')]


def test_patterns_keep_the_folders_below_their_fixed_part(trip):
  assert found('trip/*') == FLAT
  assert found('trip/**/a.*') == [FLAT[0], FIRST, SECOND]
  assert found('*/day [2-9]/?.jpg') == [('trip/day 2/a.jpg', 'trip/day 2')]
  # A file of such a name is meant itself.
  touch(trip, '[a].jpg')
  assert found('trip/[a].jpg') == [('trip/[a].jpg', '.')]


def test_patterns_below_folders_with_brackets(trip):
  (trip / 'day 1').rename(trip / '[x] y*')
  path = 'trip/[x] y*/a.jpg'
  assert found('trip/[x] y*/*.jpg') == [(path, '.')]
  whole = f'{trip}/[x] y*'
  assert found(f'{whole}/[a-c].jpg') == [(f'{whole}/a.jpg', '.')]
  assert found('trip/[x] y*/**/*.webm') == [('trip/[x] y*/late/c.webm', 'late')]
  # As a pattern these match nothing else.
  assert found('trip/[[]x*/a.jpg') == [(path, '[x] y*')]


NOT_THERE = (
  (['trip', 'trip/*.txt'], r"pattern 'trip/\*\.txt' matches no picture"),
  (['trip', 'nowhere'], 'there is no file, folder or pattern nowhere'),
  (['trip/empty'], r'no picture or video in .*--recursive'),
)


@pytest.mark.parametrize(('given', 'message'), NOT_THERE)
def test_what_is_not_there_is_told(given, message, trip):
  (trip / 'empty').mkdir()
  with pytest.raises(UserError, match=message):
    find_sources(given)


@pytest.mark.parametrize('given', ['trip', 'trip/day 1', 'trip/**/*.jpg'])
def test_a_closed_folder_is_no_empty_one(trip, given):
  (trip / 'day 1').chmod(0)
  told = r'1 folder cannot be read: \S*day 1 \(Perm'
  with obeying_permissions(), pytest.raises(UserError, match=told):
    find_sources([given], recursive=given == 'trip')
  # Its neighbour can be read nevertheless.
  assert found('trip/*2/*') == [('trip/day 2/a.jpg', 'day 2')]


def test_links_that_lead_nowhere_are_not_dropped(trip):
  (trip / 'gone.png').symlink_to(trip / 'nothing')
  (trip / 'round.png').symlink_to(trip / 'round.png')
  links = [('trip/gone.png', '.'), ('trip/round.png', '.')]
  assert found('trip') == [*FLAT, *links]


def test_files_that_are_no_pictures_are_counted(trip, capsys):
  touch(trip, 'x.heic', 'y.HEIC', 'z.gif', '.z.gif')
  assert found('trip') == FLAT
  said = 'left out of trip: 2 .heic, 1 .txt, 1 .gif\n'
  assert sorted(capsys.readouterr().out) == sorted(said)


def test_names_of_what_is_written():
  every = [Source(Path('x/a.jpg')), Source(Path('b.mp4'), Path('sub'))]
  named = sources.with_files(every)
  picture, video = (' '.join(map(str, x.files.values())) for x in named)
  assert picture == 'a.png a_color.png a_overlay.png'
  assert video == 'sub/b_color.mp4 sub/b_overlay.mp4'
  assert masks(every) == ['a.png', 'sub/b']


def test_pictures_of_the_same_name(tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  for folder in (first, second):
    touch(folder, 'a.jpg', 'a.png', 'b.jpg')
  assert masks(find_sources([first])) == ['a.jpg.png', 'a.png.png', 'b.png']
  told = f'{first}/a.jpg and {second}/a.jpg would both be written to a.jpg.png'
  every = find_sources([first / 'b.jpg', first / 'a.jpg', second])
  every = sources.with_files(every, ['masks'])
  with pytest.raises(UserError, match=told):
    sources.check_names(every)
  # The folder of a video's masks, and one of pictures.
  every = [Source(Path('day.mp4')), Source(Path('day/a.jpg'), Path('day'))]
  assert masks(every) == ['day.mp4', 'day/a.png']


def check(out, given, overwrite=False):
  every = sources.with_files(find_sources([given]))
  sources.check_output(out, every, overwrite)


def test_nothing_is_overwritten_unasked(trip):
  out = trip.parent / 'out'
  # What a killed process left is no result.
  touch(out, temporary_path(trip.parent / 'a.png').name)
  check(out, 'trip')
  check(out / 'new', 'trip')
  assert list(out.iterdir()) == []
  touch(out, 'a.png')
  check(out, 'trip', overwrite=True)
  # A pattern's sub folders would be written into themselves.
  touch(trip, 'day 1/a.png')
  for folder, given, overwrite, message in (
    (out, 'trip', False, 'is not empty; add --overwrite'),
    (trip, 'trip/a.jpg', True, 'is the folder of the pictures'),
    (trip / 'a.jpg', 'trip', False, 'is a file'),
    (trip, 'trip/*/a.png', True, r'day 1/a\.png could be overwritten'),
  ):
    with pytest.raises(UserError, match=message):
      check(folder, given, overwrite)


def test_nothing_is_written_outside_of_the_output_folder(trip):
  out = trip.parent / 'out'
  (out / 'day 1').mkdir(parents=True)
  check(out, 'trip/**/a.jpg', overwrite=True)
  touch(trip.parent, 'z.jpg')
  with pytest.raises(UserError, match=r'outside of .*remove .* or the "\.\."'):
    check(out, 'trip/*/../../z.jpg', overwrite=True)
  check(out, 'z.jpg', overwrite=True)
  (out / 'day 1').rmdir()
  for target in (trip, trip / 'day 1', trip.parent / 'nowhere'):
    (out / 'day 1').symlink_to(target)
    with pytest.raises(UserError, match=f'would lie .* in {target};'):
      check(out, 'trip/**/a.jpg', overwrite=True)
    (out / 'day 1').unlink()
  # A file that is a link is replaced; the picture to which it leads stays.
  (out / 'a.png').symlink_to(trip / 'a.jpg')
  check(out, 'trip', overwrite=True)
