'use strict';
// The classes' table, the confusion matrix and the pictures of one report.
// Whatever comes from the data is set as text, never as HTML.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);

// --- The table: sorted by a column, filtered by name -------------------------

function sortable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows]; // Equal values stay in this order.
  const headers = [...table.tHead.rows[0].cells];
  const names = new Intl.Collator('en', { numeric: true });

  function sort(column, ascending) {
    const number = headers[column].dataset.type === 'number';
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      if (a === '' || b === '') return (a === '') - (b === '');
      const compared = number ? a - b : names.compare(a, b);
      return ascending ? compared : -compared;
    };
    headers.forEach((header, i) => {
      const sorted = ascending ? 'ascending' : 'descending';
      header.setAttribute('aria-sort', i === column ? sorted : 'none');
    });
    body.append(...[...rows].sort((a, b) => order(value(a), value(b))));
  }

  headers.forEach((header, column) => {
    header.querySelector('button').addEventListener('click', () => {
      sort(column, header.getAttribute('aria-sort') !== 'ascending');
    });
  });
  return rows;
}

function filterable(rows, input, scored, output) {
  function filter() {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const name = row.querySelector('th').dataset.value.toLowerCase();
      const left = scored?.checked && 'unscored' in row.dataset;
      row.hidden = left || !name.includes(wanted);
      shown += !row.hidden;
    }
    const all = shown === rows.length;
    output.textContent = all ? '' : `${shown} of ${rows.length} classes`;
  }
  input.addEventListener('input', filter);
  scored?.addEventListener('change', filter);
  filter(); // A browser may restore what was typed before.
}

filterable(
  sortable(byId('class-table')),
  byId('filter'),
  byId('scored'), // Only where some class has no score.
  byId('filtered'),
);

// --- The confusion matrix ----------------------------------------------------

const DENSE = 9; // Pixels of a cell, below which names cannot be read.
const LARGEST = 44;

function heatMap(canvas) {
  const { names, counts, unit } = data;
  const size = names.length;
  const totals = counts.map((row) => row.reduce((sum, n) => sum + n, 0));
  const share = (r, c) => counts[r][c] / totals[r];
  const box = canvas.closest('.heat');
  const grid = box.querySelector('.heat-grid');
  const matrix = canvas.parentElement;
  const cross = ['row', 'column'].map(() => document.createElement('div'));
  const [rowNames, columnNames] = ['.rows', '.columns'].map((selector) => {
    const parent = grid.querySelector(selector);
    const labels = names.map((name) => {
      const label = document.createElement('span');
      label.textContent = label.title = name;
      return label;
    });
    parent.append(...labels);
    return labels;
  });
  for (const line of cross) {
    line.className = 'cross';
    line.hidden = true;
    matrix.append(line);
  }
  let cell = 0;
  let at = null; // [row, column] that is looked at.
  let pinned = false; // By a key or from the list, not by the pointer.

  // One pixel a cell, enlarged by the browser. Their opacity is the root of
  // the share, so that small confusions can be seen.
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const [right, wrong] = ['--right', '--wrong'].map((name) =>
      style.getPropertyValue(name).split(',').map(Number),
    );
    canvas.width = canvas.height = size;
    const context = canvas.getContext('2d');
    const image = context.createImageData(size, size);
    for (let r = 0; r < size; r++) {
      for (let c = 0; c < size; c++) {
        const opacity = totals[r] ? Math.sqrt(share(r, c)) : 0;
        const colour = [...(r === c ? right : wrong), 255 * opacity];
        image.data.set(colour, 4 * (r * size + c));
      }
    }
    context.putImageData(image, 0, 0);
  }

  function resize(pixels) {
    cell = pixels;
    canvas.dataset.cell = cell;
    grid.style.setProperty('--cell', `${cell}px`);
    canvas.style.width = canvas.style.height = `${cell * size}px`;
    grid.classList.toggle('dense', cell < DENSE);
    matrix.classList.toggle('lines', cell >= 14);
    mark();
  }

  function fit() {
    const room = box.clientWidth - 16;
    grid.classList.remove('dense');
    grid.style.setProperty('--cell', '12px');
    const labels = grid.querySelector('.rows').offsetWidth;
    const readable = Math.floor((room - labels) / size);
    const dense = Math.floor((room - 26) / size); // Without the names.
    return Math.min(LARGEST, Math.max(3, readable >= DENSE ? readable : dense));
  }

  function mark() {
    for (const labels of [rowNames, columnNames]) {
      labels.forEach((label) => label.classList.remove('at'));
    }
    cross.forEach((line) => (line.hidden = !at));
    if (!at) return;
    const [r, c] = at;
    const long = `${cell * size}px`;
    const [row, column] = cross.map((line) => line.style);
    [row.top, row.left, row.width] = [`${r * cell}px`, 0, long];
    [column.left, column.top, column.height] = [`${c * cell}px`, 0, long];
    row.height = column.width = `${cell}px`;
    rowNames[r].classList.add('at');
    columnNames[c].classList.add('at');
  }

  function look(r, c, x, y) {
    at = [r, c];
    pinned = false;
    mark();
    const part = totals[r]
      ? `${(100 * share(r, c)).toFixed(2)} % of ${names[r]}`
      : `no ${unit} is ${names[r]}`;
    const number = counts[r][c];
    const told = `${number.toLocaleString('en')} ${unit}${number === 1 ? '' : 's'}`;
    showTip(x, y, [
      r === c ? `${names[r]}, right` : `${names[r]} \u2192 ${names[c]}`,
      `ground truth ${names[r]}, predicted ${names[c]}`,
      `${told}, ${part}`,
    ]);
  }

  function lookAt(r, c) {
    const place = canvas.getBoundingClientRect();
    look(r, c, place.left + (c + 1) * cell, place.top + (r + 1) * cell);
    pinned = true;
  }

  function leave() {
    at = null;
    pinned = false;
    mark();
    byId('tip').hidden = true;
  }

  canvas.addEventListener('pointermove', (event) => {
    const place = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - place.left) / cell);
    const r = Math.floor((event.clientY - place.top) / cell);
    if (Math.min(r, c) >= 0 && Math.max(r, c) < size) {
      look(r, c, event.clientX, event.clientY);
    }
  });
  canvas.addEventListener('pointerleave', () => pinned || leave());
  canvas.addEventListener('blur', leave);
  canvas.addEventListener('keydown', (event) => {
    const steps = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
    };
    if (event.key === 'Escape') leave();
    if (!(event.key in steps)) return;
    event.preventDefault();
    const step = steps[event.key];
    const [r, c] = (at ?? [-step[0], -step[1]]).map((n, i) =>
      Math.min(Math.max(n + step[i], 0), size - 1),
    );
    lookAt(r, c);
  });
  for (const button of document.querySelectorAll('.confusions button')) {
    const [r, c] = [button.dataset.row, button.dataset.column].map(Number);
    button.addEventListener('click', () => {
      matrix.scrollIntoView({ block: 'nearest' });
      box.scrollTo(
        c * cell - box.clientWidth / 2, r * cell - box.clientHeight / 2,
      );
      lookAt(r, c);
    });
    button.addEventListener('blur', leave);
  }
  // What was not pointed at stays beside its cell.
  document.addEventListener('scroll', () => pinned && lookAt(...at), true);
  const zoom = byId('zoom');
  let chosen = false;
  zoom.addEventListener('input', () => {
    chosen = true;
    resize(Number(zoom.value));
  });
  function refit() {
    const fitting = fit();
    zoom.min = Math.min(fitting, 3);
    zoom.max = LARGEST;
    if (!chosen) zoom.value = fitting;
    resize(chosen ? Number(zoom.value) : fitting);
  }
  draw();
  refit();
  window.addEventListener('resize', refit);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
}

function showTip(x, y, lines) {
  const tip = byId('tip');
  tip.replaceChildren(
    ...lines.map((line) => {
      const element = document.createElement('div');
      element.textContent = line;
      return element;
    }),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(x + 14, document.documentElement.clientWidth - width - 8);
  const below = y + 14 + height < window.innerHeight;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${Math.max(below ? y + 14 : y - height - 14, 8)}px`;
}

if (byId('heat')) heatMap(byId('heat'));

// --- Pictures, enlarged ------------------------------------------------------

function viewer(dialog, buttons) {
  let at = 0;
  function show(index) {
    at = (index + buttons.length) % buttons.length;
    const image = buttons[at].querySelector('img');
    byId('viewer-image').src = image.src;
    byId('viewer-image').alt = byId('viewer-caption').textContent = image.alt;
  }
  buttons.forEach((button, index) => {
    button.addEventListener('click', () => {
      show(index);
      dialog.showModal();
    });
  });
  for (const button of dialog.querySelectorAll('button')) {
    const step = Number(button.dataset.step);
    button.addEventListener('click', () =>
      step ? show(at + step) : dialog.close(),
    );
  }
  dialog.addEventListener('keydown', (event) => {
    if (event.key === 'ArrowLeft') show(at - 1);
    if (event.key === 'ArrowRight') show(at + 1);
  });
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close();
  });
}

viewer(byId('viewer'), [...document.querySelectorAll('figure button')]);
