"use strict";
// Tooltips: what the browser would tell on hover, by keyboard and touch as well.
(() => {
  const all = (query) => [...document.querySelectorAll(query)];
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);

  const tell = (element, focused) => {
    tip.replaceChildren(
      ...element.dataset.tip.split("\n").map((text) => {
        const line = document.createElement("div");
        line.textContent = text;
        return line;
      }),
    );
    tip.hidden = false;
    // Marks of plots have all of it in their label already.
    if (focused && !focused.hasAttribute("aria-label")) focused.setAttribute("aria-describedby", tip.id);
    const box = element.getBoundingClientRect();
    const width = Math.min(tip.offsetWidth, innerWidth - 16);
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 8 ? above : box.bottom + 8) + scrollY}px`;
  };
  const hush = () => {
    tip.hidden = true;
  };
  for (const element of all("[title]")) {
    element.dataset.tip = element.getAttribute("title");
    element.removeAttribute("title");
  }
  for (const title of all("svg .mark > title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  for (const element of all("[data-tip]")) {
    element.addEventListener("pointerenter", () => tell(element));
    element.addEventListener("pointerleave", hush);
    element.addEventListener("focusin", (event) => tell(element, event.target));
    element.addEventListener("focusout", (event) => {
      event.target.removeAttribute("aria-describedby");
      hush();
    });
  }
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hush();
  });
})();
