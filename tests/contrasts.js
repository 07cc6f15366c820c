/**
 * How far text stands out from what is behind it, and edges, gates and bars: [{what, ratio, least}], where `least` is
 * what WCAG 2.2 asks for at level AA. Of a bar with a pattern nothing is measured.
 */
() => {
    // Colours come in many notations; a canvas knows them all.
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const brush = canvas.getContext("2d", { willReadFrequently: true });
    const read = (colour) => {
        brush.clearRect(0, 0, 1, 1);
        brush.fillStyle = colour;
        brush.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], [R, G, B]) => [r, g, b].map((v, i) => v * a + [R, G, B][i] * (1 - a)).concat(1);
    const luminance = (rgb) => {
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (one, other) => {
        const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
        return (light + 0.05) / (dark + 0.05);
    };
    const ground = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.push(read(getComputedStyle(at).backgroundColor));
        return layers.reverse().reduce((below, layer) => over(layer, below), [128, 128, 128, 1]);
    };
    const found = [];
    const add = (element, what, colour, least) => {
        const behind = ground(element);
        found.push({ what, ratio: ratio(over(read(colour), behind), behind), least });
    };
    for (const element of document.querySelectorAll("body, body *")) {
        if (!element.checkVisibility({ visibilityProperty: true }) || element.closest(".unspoken")) continue;
        const style = getComputedStyle(element);
        const isSvg = element instanceof SVGElement;
        const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        if (own.length && (!isSvg || element.tagName === "text")) {
            add(element, own[0].data.trim().slice(0, 40), isSvg ? style.fill : style.color, 4.5);
        }
        if (element.placeholder) add(element, "placeholder", getComputedStyle(element, "::placeholder").color, 4.5);
        if (element.matches("input:not([type=checkbox])") && element.value) add(element, "value", style.color, 4.5);
        if (element.matches("input, textarea")) {
            add(element.parentElement, `edge of ${element.id}`, style.borderTopColor, 3);
        }
        if (element.matches(".gate.open")) add(element.closest("figure"), "open gate", style.fill, 3);
        if (element.matches(".gate.closed")) add(element.closest("figure"), "closed gate", style.stroke, 3);
        if (element.matches(".bar") && style.backgroundImage === "none") {
            add(element.parentElement, `bar ${element.closest(".phase").dataset.phase}`, style.backgroundColor, 3);
        }
    }
    return found;
};
