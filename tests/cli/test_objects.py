"""What --object defines, as the verbs find it."""

from __future__ import annotations

import pytest

from byre.cli import common
from byre.crypto.secrets import Secret


class TestSecrets:
    def test_kept_and_never_shown(self) -> None:
        given = common.parse((common.OBJECT,), ["--object", "secret,id=s,data=hunter2", "--object",
                                                '{"qom-type": "secret", "id": "t", "file": "k"}'])  # fmt: skip
        secrets = given.secrets()
        assert secrets["s"].properties["data"] == "hunter2"
        assert secrets["t"].properties["file"] == "k"
        assert "hunter2" not in repr(secrets)

    @pytest.mark.parametrize("text", ["secret,id=s", "secret,id=s,data=hunter2,file=b", "secret,id=s,data=hunter2,x=1",
                                      "secret,id=s,data=hunter2,format=hex", "secret", "{}",
                                      "secret,data=hunter2"])  # fmt: skip
    def test_refusals_do_not_show_it(self, text: str) -> None:
        with pytest.raises(common.ByreError) as caught:
            Secret.parse(text)
        assert "hunter2" not in str(caught.value)


def test_ids_are_given_once() -> None:
    words = ["--object", "secret,id=a,data=x", "--object", "throttle-group,id=a,x-iops-total=5"]
    with pytest.raises(common.ByreError, match="'a' is defined twice"):
        common.parse((common.OBJECT,), words)
