/**
 * The bundle's sharers: a switch for each, with its gates.
 */

import { element } from "./elements.js";
import { describeGates, drawGates, tabulateGates } from "./gates.js";

/**
 * Fill the panel.
 *
 * @param {object} bundle as GET /v1/c2c gives it
 * @param {() => void} onChange called after a switch was used
 */
export function showSharers(bundle, onChange) {
  const list = document.getElementById("sharers");
  list.replaceChildren(...bundle.sharers.map((sharer) => card(sharer, bundle.receiver.num_layers)));
  list.onchange = () => {
    for (const input of list.querySelectorAll("input")) {
      input.closest(".sharer").classList.toggle("off", !input.checked);
    }
    note(bundle);
    onChange();
  };
  document.getElementById("legend").hidden = bundle.sharers.length === 0;
  note(bundle);
}

/** @returns {number[]} the numbers of the sharers that are switched on. */
export function sharersInUse() {
  return [...document.querySelectorAll("#sharers input:checked")].map((input) => Number(input.value));
}

function note(bundle) {
  document.getElementById("sharers-note").textContent = describeUse(bundle, sharersInUse());
  const [used, all] = [sharersInUse().length, bundle.sharers.length];
  document.getElementById("panel-title").textContent = all ? `Sharers and gates: ${used} of ${all} in use` : "Server";
}

function describeUse(bundle, used) {
  if (bundle.sharers.length === 0) return "This bundle holds one model, without sharers.";
  if (used.length === 0) return "None is in use, so C2C answers as the receiver alone does.";
  if (bundle.sharers.length === 1) return "It reads each prompt of C2C, and its cache is fused through the open gates.";
  const order =
    bundle.fusion_mode === "parallel" ? "each into the unfused cache" : "each into what the one before fused";
  return `They read each prompt of C2C, and their caches are fused through the open gates, ${order}.`;
}

function card(sharer, numLayers) {
  const id = `sharer-${sharer.number}`;
  const input = element("input", { type: "checkbox", role: "switch", id, value: sharer.number, checked: true });
  return element(
    "div",
    { class: "sharer" },
    element("label", { for: id }, input, element("span", { class: "name" }, sharer.name)),
    element(
      "figure",
      {},
      drawGates(sharer, numLayers),
      element(
        "figcaption",
        {},
        `${describeGates(sharer)} Lines lead from its ${sharer.num_layers} layers to the receiver’s.`,
      ),
    ),
    element(
      "details",
      {},
      element("summary", {}, "Gates as a table"),
      element("div", { class: "scroll" }, tabulateGates(sharer)),
    ),
  );
}
