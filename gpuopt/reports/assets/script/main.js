// Every picture that has something to show; the line of sections that follows the reader.
if (scene.rooflines.length) {
  picture("roofline", drawRoofline);
  const section = document.getElementById("roofline");
  section.querySelectorAll(":scope > details.plain-table").forEach(table => { table.hidden = true; });
  const host = element("div", {});
  document.querySelector('[data-picture="roofline"]').append(host);
  opsTable(host);
}
if (scene.trees.length) picture("treemap", drawTreemap);
if (scene.curves.length) picture("curves", drawCurves);

const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.getAttribute("href").slice(1), link]));
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) links.forEach((link, id) => link.classList.toggle("here", id === entry.target.id));
}, {rootMargin: "-20% 0px -70% 0px"});
links.forEach((_, id) => seen.observe(document.getElementById(id)));
