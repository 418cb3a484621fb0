// The image fields of the form: choose, drop or paste, look at it, take it away again.
// Owns the two tiles. Knows nothing about models, beyond which tiles it is told to show.

const tiles = [...document.querySelectorAll(".image")];
const fieldOf = (tile) => tile.querySelector("input");

let onChange = () => {};

export function startImages(whenChanged) {
  onChange = whenChanged;
  for (const tile of tiles) {
    fieldOf(tile).addEventListener("change", () => refresh(tile));
    tile.querySelector(".image-remove").addEventListener("click", () => {
      clear(tile);
      fieldOf(tile).focus();
    });
    tile.addEventListener("dragover", (event) => {
      event.preventDefault();
      tile.classList.add("dropping");
    });
    tile.addEventListener("dragleave", () => tile.classList.remove("dropping"));
    tile.addEventListener("drop", (event) => {
      event.preventDefault();
      tile.classList.remove("dropping");
      take(tile, event.dataTransfer);
    });
  }
  document.addEventListener("paste", (event) => {
    const free = tiles.find((tile) => !tile.hidden && !fieldOf(tile).files.length);
    if (free && !free.parentElement.hidden) take(free, event.clipboardData);
  });
}

// Shows the tiles of these fields; "required" or "optional" for each.
export function showImages(needs) {
  for (const tile of tiles) {
    const need = needs[tile.dataset.image];
    tile.hidden = !need;
    if (tile.dataset.image === "input_reference" && need) {
      tile.querySelector(".image-hint").textContent =
        need === "required" ? "Choose, drop or paste an image" : "Optional: choose, drop or paste";
    }
  }
  tiles[0].parentElement.hidden = Object.keys(needs).length === 0;
}

// Field -> File of the tiles that are shown.
export function chosenImages() {
  const chosen = tiles.filter((tile) => !tile.hidden && fieldOf(tile).files.length);
  return Object.fromEntries(chosen.map((tile) => [tile.dataset.image, fieldOf(tile).files[0]]));
}

export function clearImages() {
  tiles.forEach(clear);
}

function take(tile, transfer) {
  const file = [...transfer.files].find((each) => each.type.startsWith("image/"));
  if (!file) return;
  const one = new DataTransfer(); // the way to give an <input type=file> a file
  one.items.add(file);
  fieldOf(tile).files = one.files;
  refresh(tile);
}

function clear(tile) {
  fieldOf(tile).value = "";
  refresh(tile);
}

function refresh(tile) {
  const picture = tile.querySelector(".image-preview");
  const file = fieldOf(tile).files[0];
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.hidden = tile.querySelector(".image-remove").hidden = !file;
  tile.classList.toggle("filled", Boolean(file));
  if (file) {
    picture.src = URL.createObjectURL(file);
    picture.alt = file.name;
  } else {
    picture.removeAttribute("src");
  }
  onChange();
}
