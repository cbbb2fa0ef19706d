"""The documentation's links lead somewhere."""

import pytest
from documents import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor and not anchor.startswith("ddpm_jax."):  # those are made when the site is built, which checks them
            assert anchor in anchors(str(found.resolve().relative_to(ROOT))), f"{page}: {target}"
