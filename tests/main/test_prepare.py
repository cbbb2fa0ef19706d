"""--mode=prepare."""

import re


def test_says_what_and_where_the_images_are(call, data_dir):
    status, output = call("--mode=prepare")
    assert status == 0, output
    assert "1,797 images of 8x8x1" in output
    assert f"in {data_dir}/digits/" in output


def test_an_image_that_cannot_be_read(call, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    folder = ("--config.data.source=folder", f"--config.data.path={tmp_path}")
    status, output = call("--mode=prepare", *folder)
    assert status == 1
    assert re.match(
        r"error: 1 of 1 images in .* cannot be read, the first 'a.png': it is not a picture of a known format, or "
        "damaged; remove",
        output.splitlines()[-1],
    )
