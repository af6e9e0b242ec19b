"use strict";
// Sorting and filtering. Without this script the page shows the same, in order of rank.
(() => {
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const tables = all("table.board");
  const form = document.querySelector("form.filters");
  const whole = (row) => {
    const next = row.nextElementSibling;
    return next?.classList.contains("remarks") ? [row, next] : [row]; // its remarks go with it
  };

  if (!form) return;

  // --- the state lies in the address, so that a view can be shared -------------------------------
  const start = { sort: "rank", down: false };
  let order = { ...start };

  const remember = () => {
    const words = new URLSearchParams();
    for (const field of form.elements) {
      const value = field.type === "checkbox" ? (field.checked ? "yes" : "") : field.value;
      if (field.name && value) words.set(field.name, value);
    }
    if (order.sort !== start.sort || order.down) {
      words.set("sort", `${order.sort}.${order.down ? "down" : "up"}`);
    }
    const text = words.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  };

  const recall = () => {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return;
    const words = new URLSearchParams(text);
    for (const field of form.elements) {
      if (field.type === "checkbox") field.checked = words.get(field.name) === "yes";
      else if (field.name) field.value = words.get(field.name) ?? "";
      if (field.tagName === "SELECT" && field.selectedIndex < 0) field.value = "";
    }
    const [sort, way] = (words.get("sort") ?? "").split(".");
    const known = tables.some((one) => all("thead [data-key]", one).some((h) => h.dataset.key === sort));
    order = known ? { sort, down: way === "down" } : { ...start };
  };

  // --- filtering ---------------------------------------------------------------------------------
  const count = document.getElementById("count");
  const filter = () => {
    const wanted = new FormData(form);
    const text = (wanted.get("q") ?? "").toString().toLowerCase().split(/\s+/).filter(Boolean);
    const keys = all("select", form).map((field) => field.name);
    let seen = 0;
    let total = 0;
    for (const section of all("section.protocol")) {
      let here = 0;
      for (const row of all("tr[data-text]", section)) {
        const fits =
          keys.every((key) => !wanted.get(key) || row.dataset[key] === wanted.get(key)) &&
          text.every((word) => row.dataset.text.includes(word)) &&
          (!wanted.get("ranked") || row.dataset.ranked === "yes");
        for (const one of whole(row)) one.hidden = !fits;
        here += fits;
        total += 1;
        const mark = section.querySelectorAll(`.mark[data-row="${CSS.escape(row.dataset.row)}"]`);
        for (const one of mark) one.classList.toggle("faded", !fits);
      }
      for (const body of all("tbody", section)) {
        body.hidden = !all("tr[data-text]", body).some((row) => !row.hidden);
      }
      section.hidden = here === 0;
      seen += here;
    }
    count.textContent = seen === total ? `${total} rows` : `${seen} of ${total} rows`;
    document.getElementById("none").hidden = seen > 0;
  };

  // --- sorting -----------------------------------------------------------------------------------
  const sort = () => {
    for (const table of tables) {
      const heads = all("thead [data-key]", table);
      const at = heads.findIndex((head) => head.dataset.key === order.sort);
      for (const head of heads) head.removeAttribute("aria-sort");
      if (at < 0) continue;
      const words = heads[at].dataset.words === "yes";
      heads[at].setAttribute("aria-sort", order.down ? "descending" : "ascending");
      const value = (row) => row.cells[at].dataset.value ?? "";
      const compare = (one, other) => {
        const [a, b] = [value(one), value(other)];
        if (!a || !b) return a ? -1 : b ? 1 : 0; // what has no value stands last, either way
        const least = words ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b);
        return order.down ? -least : least;
      };
      for (const body of all("tbody", table)) {
        const rows = all("tr[data-text]", body);
        const first = new Map(rows.map((row) => [row, Number(row.dataset.order)]));
        rows.sort((one, other) => compare(one, other) || first.get(one) - first.get(other));
        body.append(...rows.flatMap(whole));
      }
    }
  };

  const sortable = tables.filter((table) => all("tr[data-text]", table).length > 2);
  for (const head of sortable.flatMap((table) => all("thead [data-key]", table))) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const key = head.dataset.key;
      const first = head.dataset.down === "yes";
      order = { sort: key, down: order.sort === key ? !order.down : first };
      sort();
      remember();
    });
  }
  const update = () => {
    filter();
    remember();
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("[type=reset]").addEventListener("click", (event) => {
    event.preventDefault();
    form.reset(); // at once, so that what follows sees empty fields
    order = { ...start };
    sort();
    update();
  });
  addEventListener("hashchange", () => {
    recall();
    sort();
    filter();
  });
  form.hidden = false;
  recall();
  sort();
  filter();
})();
