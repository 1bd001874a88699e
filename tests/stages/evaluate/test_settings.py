"""Settings of an evaluation that mean nothing are one clear line."""

from __future__ import annotations

import pytest

from latent_thoughts.config import resolve
from latent_thoughts.types import UserError

MISTAKES = {
    "evaluate.bound=[]": "evaluate.bound: List should have at least 1 item",
    "evaluate.bound_temperature=0": "evaluate.bound_temperature: Input should be greater than 0",
    "evaluate.bound_temperature=.inf": "evaluate.bound_temperature: Input should be a finite number",
    "evaluate.temperature=-1": "evaluate.temperature: Input should be greater than or equal to 0",
    "evaluate.temperature=.nan": "evaluate.temperature: Input should be a finite number",
    "evaluate.tasks=[{name: gsm8k, temperature: .inf}]": "temperature: Input should be a finite number",
    "evaluate.answer='ends in'": "evaluate.answer: it needs a group around what is the answer",
    "evaluate.answer='('": "evaluate.answer: not a regular expression",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_setting_that_means_nothing_is_refused(setting: str) -> None:
    with pytest.raises(UserError) as error:
        resolve({}, [setting])
    assert MISTAKES[setting] in str(error.value)
