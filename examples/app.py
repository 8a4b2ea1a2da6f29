"""A page to try the model beside it: `python app.py` here, or a Hugging Face Space; gradio 6.31 was tried."""

import json
from pathlib import Path

import gradio as gr
import onnxruntime  # not torch: .2 GB to install in place of 6, and no ten seconds of import
from detect_onnx import detect
from PIL import Image, ImageDraw, ImageOps

CONFIG = json.loads(Path("config.json").read_text(encoding="utf-8"))
SESSION = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
COLUMNS = ["number", "class", "score", "x1", "y1", "x2", "y2"]  # of an object, in pixels


def find(path: str | None, least: float) -> tuple[Image.Image, list[list]]:
    """Return a drawn copy of a picture, and COLUMNS of each object; least: a score, 0 is each class's own."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        assert picture.mode[0] not in "IF"  # grey of 16 bits, which would become white
        picture = picture.convert("RGB")
    except Exception:  # Pillow raises many
        raise gr.Error("No readable picture: take a JPEG or PNG of 8 bits.", print_exception=False) from None
    rows = []
    draw = ImageDraw.Draw(picture)
    for number, (name, score, box) in enumerate(detect(SESSION, picture.copy(), least), start=1):
        rows.append([number, name, round(score, 3), *(round(side, 1) for side in box)])
        color = f"hsl({137 * CONFIG['classes'].index(name) % 360}, 90%, 35%)"
        draw.rectangle(box, outline=color, width=max(picture.size) // 400 + 1)
        caption = f"{number} {name}" if name.isascii() else str(number)  # the font has no other letters
        draw.text(box[:2], caption, font_size=max(picture.size) // 35, stroke_width=2, stroke_fill=color)
    return picture, rows


card = CONFIG.get("card", "gradio_api/file=README.md")
inputs = [gr.Image(label="Picture"), gr.Slider(0, 1, 0, label="Score threshold; 0: each class's own")]
inputs[0].preprocess = lambda payload: payload and payload.path  # gradio's own fails on what is no picture
outputs = [gr.Image(label="Objects", format="jpeg"), gr.Dataframe(headers=COLUMNS, label="Boxes in pixels")]
page = gr.Interface(find, inputs, outputs, description=f"[Model card]({card})", flagging_mode="never")
page.launch(allowed_paths=["README.md"])
