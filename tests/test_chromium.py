"""A machine without Chromium is told so: tests of pages neither pass nor vanish there."""

import pytest
from chromium import find_chromium


@pytest.mark.parametrize("named", [None, "no-such-browser"])
def test_a_missing_chromium_fails_with_what_to_install(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CHROMIUM", raising=False)
    if named:
        monkeypatch.setenv("CHROMIUM", named)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium") as failure:
        find_chromium()
    assert (named or "chromium-browser") in str(failure.value)
