"""What is asked of a treatment and a method becomes configs of stages."""

import pytest

from fqdiff.errors import ConfigError
from fqdiff.treatment.request import Request, Wish, make_treatment

INT8 = {"format": "int8"}


def test_a_budget_of_minutes_is_shared_out_among_what_learns() -> None:
    both = make_treatment(Request(activations=INT8, minutes=8.0), "q-diffusion")
    assert both.reconstruct is not None
    assert both.activation_steps is not None
    assert (both.reconstruct.minutes, both.activation_steps.minutes) == (6.0, 2.0)
    alone = make_treatment(Request(minutes=8.0), "q-diffusion")
    assert alone.reconstruct is not None
    assert alone.reconstruct.minutes == 8.0
    steps = make_treatment(Request(activations=INT8, activation_steps=Wish(True), minutes=8.0))
    assert steps.activation_steps is not None
    assert steps.activation_steps.minutes == 8.0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(minutes=1.0), "nothing that learns by them"),
        (Request(reconstruct=Wish(True, {"minutes": 2.0}), minutes=1.0), "beside minutes of its own"),
    ],
)
def test_a_budget_that_nobody_keeps_to_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_treatment(request_)
