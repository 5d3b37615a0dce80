"""The page to try a network on pictures, made of Gradio's components."""

import functools
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from resnest_jax.demo import result
from resnest_jax.errors import UserError, enough_memory
from resnest_jax.inference.predictor import Predictor
from resnest_jax.text import readable
from resnest_jax.weights.infer import title_of

MAX_FILE_SIZE = '100mb'  # Of an upload.
MAX_UPLOADS = 2 * 10**9  # Bytes of all; the oldest are deleted first.
EMPTY = '<p class="empty">Drop a picture into the box, or choose one.</p>'
# In the browser: the slider moves without a round trip to the server.
SET_OPACITY = """(percent) => {
  document.documentElement.style.setProperty('--opacity', percent / 100);
}"""
TITLE = 'Semantic segmentation'


def look() -> dict:
  """Theme and style, as arguments of `Blocks.launch`."""
  css = importlib.resources.files(__package__).joinpath('page.css')
  # Gradio's default fonts come from Google's servers.
  theme = gr.themes.Default(
    primary_hue='blue',
    font=['system-ui', 'Segoe UI', 'Roboto', 'Noto Sans', 'sans-serif'],
    font_mono=['ui-monospace', 'Consolas', 'monospace'],
  )
  return {'theme': theme, 'css': css.read_text('utf-8')}


def make_page(
  predictor: Predictor, name: str, examples: Sequence[Path] = ()
) -> gr.Blocks:
  """The page, not yet served; it calls the predictor from one thread."""
  name = readable(name)
  with gr.Blocks(
    title=f'{name}: {TITLE.lower()}',
    analytics_enabled=False,
    # Seconds between clean-ups, and the age from which uploads are deleted.
    delete_cache=(3600, 3600),
  ) as page:
    model = predictor.about['model']
    step = predictor.about['weights'].get('step')
    about = escape(
      f'{name}{"" if step is None else f", step {step}"}: {model["head"]} on '
      f'{title_of(model)}, {len(predictor.classes)} classes'
    )
    gr.HTML(f'<h1>{TITLE}</h1><p class="facts">{about}</p>', elem_id='heading')
    with gr.Row():
      with gr.Column(scale=2, min_width=280):
        picture = gr.Image(
          label='Picture',
          type='filepath',
          sources=['upload', 'clipboard'],
          buttons=[],
          height=320,
          elem_id='picture',
        )
        if examples:
          gr.Examples(
            [[str(path)] for path in examples],
            picture,
            label='Examples',
            elem_id='examples',
          )
      with gr.Column(scale=3, min_width=320):
        overlay = gr.HTML(EMPTY, elem_id='overlay')
        opacity = gr.Slider(
          0, 100, 50, label='Opacity of the colours, %', elem_id='opacity'
        )
        facts = gr.HTML(elem_id='facts')
        legend = gr.HTML(elem_id='legend')
    opacity.change(None, opacity, js=SET_OPACITY)
    picture.change(
      functools.partial(_show, predictor),
      picture,
      [overlay, facts, legend],
      # Gradio would decode the file and report a broken one only as "Error".
      preprocess=False,
      # The predictor's callbacks belong to the picture that is predicted.
      concurrency_limit=1,
      show_progress_on=[overlay, facts, legend],
      api_visibility='private',
    )
  return page


def _show(
  predictor: Predictor, upload: Mapping[str, Any] | None
) -> tuple[str, str, str]:
  """Overlay, facts and legend of an upload, as HTML."""
  if not upload:  # The picture was removed from the box.
    return EMPTY, '', ''
  predictor.on_compile = _say_compiling
  try:
    with enough_memory('Give a smaller picture.'):
      seen = result.look_at(predictor, uploaded(upload))
    parts = result.overlay(seen), result.facts(seen)
    parts = *parts, result.legend(seen.prediction)
  except UserError as error:  # A screen reader announces it.
    told = escape(str(error))
    parts = f'<p class="problem" role="alert">{told}</p>', '', ''
  return tuple(map(readable, parts))


def uploaded(upload: Mapping[str, Any]) -> Path:
  """The path of an upload; `UserError` if the file was not uploaded."""
  # The browser may send any path, with '..' and links. The message does not
  # tell whether a file outside of Gradio's folder exists.
  try:
    path = Path(upload['path']).resolve()
  # What a program sends need not be what the page would send.
  except (TypeError, LookupError, ValueError, OSError) as error:
    raise UserError('this is no upload.') from error
  if not path.is_relative_to(Path(os.environ['GRADIO_TEMP_DIR']).resolve()):
    raise UserError(f'{path.name} was not uploaded.')
  return path


def _say_compiling(height: int, width: int) -> None:
  gr.Info(
    f'Compiling for pictures of up to {width} x {height} pixels. This happens '
    'once for each such size and can take a minute.'
  )
