/**
 * What is wrong with a page's structure: ids given twice, references to nothing, headings that skip a level, a missing
 * language or title.
 */
() => {
    const wrong = [];
    const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
    for (const id of new Set(ids.filter((each, index) => ids.indexOf(each) !== index))) wrong.push(`id ${id} twice`);
    for (const name of ["aria-labelledby", "aria-describedby", "for"]) {
        for (const each of document.querySelectorAll(`[${name}]`)) {
            for (const id of each.getAttribute(name).split(" ")) {
                if (!document.getElementById(id)) wrong.push(`${name} names no element: ${id}`);
            }
        }
    }
    const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
        .filter((each) => each.checkVisibility())
        .map((each) => Number(each.tagName[1]));
    if (levels[0] !== 1) wrong.push("the first heading is no h1");
    levels.slice(1).forEach((level, index) => {
        if (level > levels[index] + 1) wrong.push(`h${level} follows h${levels[index]}`);
    });
    if (!document.documentElement.lang) wrong.push("the page has no language");
    if (!document.title) wrong.push("the page has no title");
    return wrong;
};
