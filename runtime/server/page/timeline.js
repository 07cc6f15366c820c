/**
 * Timelines of the answers of one turn, on one axis, so that bars can be compared across the answers.
 */

import { element } from "./elements.js";
import { axisEnd, axisText } from "./timings.js";

/** An axis that several timelines share. */
export class Axis {
  /** Seconds at the right end. */
  end = 0.01;
  #timelines = [];

  /** Take in a timeline that is drawn on this axis. */
  add(timeline) {
    this.#timelines.push(timeline);
  }

  /** Fit the axis to what its timelines show, and draw them all anew. */
  fit() {
    this.end = axisEnd(Math.max(...this.#timelines.map((each) => each.last), 0.01));
    for (const timeline of this.#timelines) timeline.draw();
  }
}

/** One answer's phases: a list of names, bars and durations. */
export class Timeline {
  #axis;
  #phases = [];
  #rows = new Map();
  #list = element("ol", { class: "phases" });
  #end = element("span");

  constructor(axis) {
    this.#axis = axis;
    const ends = element("p", { class: "axis", "aria-hidden": "true" }, element("span", {}, "0"), this.#end);
    this.element = element("div", { class: "timeline", hidden: true }, this.#list, ends);
    axis.add(this);
  }

  /** Seconds at which the last phase ends. */
  get last() {
    return Math.max(0, ...this.#phases.map((phase) => phase.to));
  }

  /** Show these phases (see timings.js); the axis follows. */
  show(phases) {
    this.#phases = phases;
    this.element.hidden = phases.length === 0;
    this.#axis.fit();
  }

  /** Place the bars on the axis. */
  draw() {
    const rows = this.#phases.map((phase) => this.#row(phase));
    // Rows stay, so that what is being read does not vanish.
    if (rows.some((row, index) => row !== this.#list.children[index]) || rows.length !== this.#list.childElementCount) {
      this.#list.replaceChildren(...rows);
    }
    this.#end.textContent = axisText(this.#axis.end);
  }

  #row(phase) {
    const row = this.#rows.get(phase.kind) ?? newRow(phase);
    this.#rows.set(phase.kind, row);
    const share = (time) => `${((100 * time) / this.#axis.end).toFixed(3)}%`;
    row.style.setProperty("--from", share(phase.from));
    row.style.setProperty("--long", share(phase.to - phase.from));
    row.querySelector(".time").textContent = phase.text;
    return row;
  }
}

function newRow(phase) {
  return element(
    "li",
    { class: "phase", "data-phase": phase.kind },
    element("span", { class: "name" }, phase.name),
    element("span", { class: "track", "aria-hidden": "true" }, element("span", { class: "bar" })),
    element("span", { class: "time" }),
  );
}
