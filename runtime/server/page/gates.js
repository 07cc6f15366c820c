/**
 * The gates of one sharer by receiver layer: a drawing, a sentence and a table that say the same.
 *
 * The drawing has the sharer's layers on top, the receiver's below, a line from each sharer layer to the receiver
 * layer that it feeds, and under it two rows of squares: the K and the V gate. Full is open, hollow is closed, a dot is
 * a layer without a projector.
 */

import { element, shape } from "./elements.js";

const WIDTH = 280;
const LEFT = 18;
const WIDEST = 26;
const NARROWEST = 4.2;
const SHARER_Y = 26;
const RECEIVER_Y = 74;
const ROWS = [
  ["K", "key", 82],
  ["V", "value", 100],
];
const SQUARE = 14;
const HEIGHT = 132;

/**
 * @param {object} sharer as GET /v1/c2c gives it
 * @param {number} numLayers of the receiver
 * @returns {SVGElement}
 */
export function drawGates(sharer, numLayers) {
  const pitch = Math.min(Math.max((WIDTH - LEFT) / numLayers, NARROWEST), WIDEST);
  const width = pitch * numLayers;
  const size = Math.min(SQUARE, pitch - Math.min(2, pitch * 0.2));
  const receiverX = (layer) => LEFT + pitch * (layer + 0.5);
  const sharerX = (layer) => LEFT + (width * (layer + 0.5)) / sharer.num_layers;
  const links = new Map(sharer.layers.map((link) => [link.receiver_layer, link]));

  const wires = sharer.layers.map((link) => {
    const [from, to] = [sharerX(link.sharer_layer), receiverX(link.receiver_layer)];
    const path = `M${from} ${SHARER_Y}V${SHARER_Y + 8}L${to} ${RECEIVER_Y - 8}V${RECEIVER_Y}`;
    return shape("path", { class: link.key || link.value ? "wire" : "wire closed", d: path });
  });
  const squares = ROWS.flatMap(([, gate, y]) =>
    Array.from({ length: numLayers }, (_, layer) => {
      const link = links.get(layer);
      if (!link) return shape("circle", { class: "unlinked", cx: receiverX(layer), cy: y + SQUARE / 2, r: 1.2 });
      return square(receiverX(layer), y, size, link[gate]);
    }),
  );
  const columns = sharer.layers.map((link) => {
    const x = LEFT + pitch * link.receiver_layer;
    const area = { class: "area", x, y: RECEIVER_Y - 8, width: pitch, height: HEIGHT - RECEIVER_Y };
    return shape("rect", area, shape("title", {}, describeLink(link)));
  });
  return shape(
    "svg",
    {
      class: "gates",
      viewBox: `0 0 ${Math.max(LEFT + width + 2, WIDTH)} ${HEIGHT}`,
      role: "img",
      "aria-label": `Gates of ${sharer.name}. ${describeGates(sharer)}`,
    },
    ...wires,
    ...numbers(sharer.num_layers, sharerX, width / sharer.num_layers, SHARER_Y - 5),
    ...ROWS.map(([name, , y]) => shape("text", { class: "row", x: 0, y: y + SQUARE - 3 }, name)),
    ...squares,
    ...numbers(numLayers, receiverX, pitch, HEIGHT - 5),
    ...columns,
  );
}

/** @returns {string} how many gates are open, and in which layers they are closed. */
export function describeGates(sharer) {
  const sentences = ROWS.map(([name, gate]) => {
    const layers = (isOpen) => sharer.layers.filter((link) => link[gate] === isOpen).map((link) => link.receiver_layer);
    const [open, closed] = [layers(true), layers(false)];
    if (!closed.length) return `${name} is open in all ${open.length} fused layers`;
    if (!open.length) return `${name} is closed in all ${closed.length} fused layers`;
    return `${name} is open in ${open.length} of ${sharer.layers.length} fused layers, closed in ${ranges(closed)}`;
  });
  return `${sentences.join("; ")}.`;
}

/** @returns {HTMLElement} a table of every fused layer. */
export function tabulateGates(sharer) {
  const heading = (text) => element("th", { scope: "col" }, text);
  const state = (isOpen) => element("td", {}, isOpen ? "open" : "closed");
  return element(
    "table",
    {},
    element("caption", { class: "unspoken" }, `Gates of ${sharer.name} by receiver layer`),
    element("thead", {}, element("tr", {}, ...["Receiver layer", "Sharer layer", "K", "V"].map(heading))),
    element(
      "tbody",
      {},
      ...sharer.layers.map((link) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, String(link.receiver_layer)),
          element("td", {}, String(link.sharer_layer)),
          state(link.key),
          state(link.value),
        ),
      ),
    ),
  );
}

/** @returns {string} such as "0–3, 7 and 9–11", of rising numbers. */
export function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    const last = runs.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  const texts = runs.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`));
  return texts.length < 2 ? texts.join("") : `${texts.slice(0, -1).join(", ")} and ${texts.at(-1)}`;
}

function describeLink(link) {
  const state = (isOpen) => (isOpen ? "open" : "closed");
  return (
    `receiver layer ${link.receiver_layer} from sharer layer ${link.sharer_layer}: ` +
    `K ${state(link.key)}, V ${state(link.value)}`
  );
}

function square(middle, y, size, isOpen) {
  // A stroke lies half outside.
  const inset = isOpen ? 0 : 0.6;
  return shape("rect", {
    class: isOpen ? "gate open" : "gate closed",
    x: middle - size / 2 + inset,
    y: y + (SQUARE - size) / 2 + inset,
    width: size - 2 * inset,
    height: size - 2 * inset,
  });
}

/** As many layers' numbers as fit, in steps that are easy to count in. */
function numbers(count, x, pitch, y) {
  const step = [1, 2, 5, 10, 20, 50, 100].find((each) => each * pitch >= 20);
  const shown = [];
  for (let layer = 0; layer < count; layer += step) shown.push(layer);
  const label = (layer) => shape("text", { class: "layer", x: x(layer), y }, String(layer));
  return shown.map(label);
}
