/**
 * Making elements. Text is only ever set as text, never parsed as HTML: much of it comes from a model.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} name such as "p"
 * @param {object} attributes by name; false and null leave one out, true gives it without a value
 * @param {...(Node|string)} children
 * @returns {HTMLElement}
 */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** As `element`, in SVG. @returns {SVGElement} */
export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}
