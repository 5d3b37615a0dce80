"""Names that mean something to some sink: markup, emoji, HTML, a formula."""

NAMES = [
  '[void]',
  'sky [blue]',
  'a[/b]',
  'road [/red]',
  ':car:',
  '{task.total}',
  'x\\',
  '<b>&amp;',
  '$a_1$',
  '\u80cc\u666f',
]
