"use strict";
{
  const main = document.getElementById("cards");
  const [filter, status, sort, reverse, shown] = ["filter", "status", "sort", "reverse", "shown"]
    .map((id) => document.getElementById(id));
  const fold = (text) => text.replace(/\s+/g, " ").trim().toLowerCase();
  const number = (text) => (text === undefined ? null : Number(text));
  const names = new Intl.Collator("en", { numeric: true });

  const cards = [...main.children].map((element, order) => {
    const name = element.querySelector("h2").textContent;
    const records = [...element.querySelectorAll("section")].map((section) => ({
      element: section,
      status: section.dataset.status,
      warned: "warned" in section.dataset,
      text: fold(`${name} ${section.textContent}`),
    }));
    // Failures before warnings before the rest.
    const rank = Math.min(...records.map((record) => (record.status === "failure" ? 0 : record.warned ? 1 : 2)));
    const { seconds, tokens } = element.dataset;
    return { element, records, run: order, input: name, status: rank, seconds: number(seconds), tokens: number(tokens) };
  });
  const total = cards.reduce((sum, card) => sum + card.records.length, 0);

  function show() {
    const text = fold(filter.value);
    const kind = status.value;
    let count = 0;
    for (const card of cards) {
      let matching = 0;
      for (const record of card.records) {
        const right = kind === "all" || (kind === "warned" ? record.warned : record.status === kind);
        const matches = right && record.text.includes(text);
        record.element.hidden = !matches;
        matching += matches;
      }
      card.element.hidden = matching === 0;
      count += matching;
    }
    const all = `${total.toLocaleString("en")} record${total === 1 ? "" : "s"}`;
    shown.textContent = count === total ? all : `${count.toLocaleString("en")} of ${all}`;
  }

  function order() {
    const key = sort.value;
    const sign = reverse.getAttribute("aria-pressed") === "true" ? -1 : 1;
    const compare = key === "input" ? names.compare : (one, other) => one - other;
    cards.sort((one, other) => {
      const [a, b] = [one[key], other[key]];
      if (a === null || b === null) return (a === null) - (b === null) || one.run - other.run; // without a value: last
      return sign * compare(a, b) || one.run - other.run;
    });
    main.replaceChildren(); // all at once: taking them out one by one takes minutes for thousands
    const all = document.createDocumentFragment();
    for (const card of cards) all.append(card.element);
    main.append(all);
  }

  filter.addEventListener("input", show);
  status.addEventListener("change", show);
  sort.addEventListener("change", order);
  reverse.addEventListener("click", () => {
    reverse.setAttribute("aria-pressed", reverse.getAttribute("aria-pressed") !== "true");
    order();
  });
  document.getElementById("controls").hidden = false;
  show(); // a browser may have kept what was typed before a reload
  if (sort.value !== "run") order();
}
