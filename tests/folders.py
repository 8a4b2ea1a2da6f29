"""Helpers of the tests of lists and pictures: small folders as other programs write them."""

import pytest
from PIL import Image

import ssd_object_detection as ssd

BOX = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>21</ymax></bndbox>"
OBJECT = "<object><name>{}</name>" + BOX + "</object>"
SIZE = (40, 30)  # width, height


def annotation(name="cat", filename=""):
    """Return VOC XML with one object."""
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{OBJECT.format(name)}</annotation>"


def write(
    root,
    names,
    lists=None,
    pictures="JPEGImages",
    annotations="Annotations",
    where="ImageSets/Main",
    label="cat",
):
    """Write pictures (.png, or their own ending), annotations and {list: lines}; returns root."""
    for folder in (pictures, annotations):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        stem = ssd.without_ending(name)
        file_name = name if stem != name else f"{name}.png"
        Image.new("RGB", SIZE, (number, 90, 90)).save(root / pictures / file_name)
        (root / annotations / f"{stem}.xml").write_text(annotation(label))
    for split, lines in (lists or {}).items():
        (root / where).mkdir(parents=True, exist_ok=True)
        (root / where / f"{split}.txt").write_text("\n".join(lines))
    return root


def load(root, **flags):
    return ssd.load_data(str(root), **{"val_fraction": 0, **flags})


def ids(records):
    return [record.image_id for record in records]


def refusal(call, *args, **flags):
    """Return the one line of the InputError that a call raises."""
    with pytest.raises(ssd.InputError) as error:
        call(*args, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)
