// Pictures for the next message: chosen, pasted or dropped, scaled down here, and shown before they are sent.
"use strict";

const MOST = 8; // pictures in a message
const LONGEST = 1024; // longest side in pixels of a picture that is sent

const pictures = { waiting: [], coming: Promise.resolve() };

async function shrunken(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG would turn transparent pixels black
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.85);
}

function take(files) {
  return pictures.coming = pictures.coming.then(() => takeIn(files)); // a message sent meanwhile waits for them
}

async function takeIn(files) {
  $("unseen").textContent = "";
  for (const file of files) {
    if (pictures.waiting.length === MOST) {
      $("unseen").textContent = `A message can have at most ${MOST} pictures.`;
      break;
    }
    try {
      pictures.waiting.push(await shrunken(file));
    } catch {
      $("unseen").textContent = `${file.name || "This file"} can't be read as a picture.`;
    }
  }
  drawWaiting();
}

function drawWaiting() {
  $("waiting").replaceChildren(...pictures.waiting.map((url, place) => {
    const drop = element("button", { type: "button", textContent: "×", ariaLabel: `Remove picture ${place + 1}` });
    drop.onclick = () => {
      pictures.waiting.splice(place, 1);
      drawWaiting();
      $("text").focus();
    };
    return element("li", {}, element("img", { src: url, alt: `Picture ${place + 1} of the next message` }), drop);
  }));
  $("waiting").hidden = !pictures.waiting.length;
}

function shown(urls) {
  return (urls ?? []).map((url, place) => element("img", { src: url, alt: `Picture ${place + 1} of the message` }));
}

function asked({ content, pictures: urls }) {
  if (!urls?.length) return content;
  return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: content }];
}

function wait(urls) {
  pictures.waiting = [...(urls ?? [])];
  $("unseen").textContent = "";
  drawWaiting();
}

$("attach").onclick = () => $("files").click();
$("files").onchange = async () => {
  await take([...$("files").files]);
  $("files").value = "";
  $("text").focus();
};
$("text").onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  take(files);
};
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault(); // otherwise the browser opens the file in place of the chat
  take([...event.dataTransfer.files]);
};
