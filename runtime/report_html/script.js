"use strict";
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {
      // Without permission to write, the reader copies what is selected.
      getSelection().selectAllChildren(source);
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
}
const filter = document.getElementById("filter");
filter?.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  let count = 0;
  for (const group of document.querySelectorAll("details.remarks")) {
    let left = 0;
    for (const entry of group.querySelectorAll("li")) {
      entry.hidden = !entry.textContent.toLowerCase().includes(wanted);
      left += entry.hidden ? 0 : 1;
    }
    group.hidden = left === 0;
    count += left;
  }
  document.getElementById("found").textContent = wanted ? `${count} found` : "";
});
