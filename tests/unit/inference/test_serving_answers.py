"""Answers of ``llamax serve`` as its interfaces write them, without a server."""

from __future__ import annotations

import pytest
from support.fuzz_serving import service

from llamax.inference.serving import tgi
from llamax.inference.serving.scheduler import Drawn, Step
from llamax.inference.serving.service import Served, Service, UnknownModel


@pytest.fixture(scope="module")
def made() -> Service:
    return service()


def test_text_that_was_held_back_comes_with_the_token_that_ends_an_answer(made: Service) -> None:
    """Clients of TGI show the texts of its tokens; "ab" may have been the beginning of a stop."""
    served = made.models["m"]
    (end,) = served.loaded.ends
    assert tgi._token(served, Step(Drawn(end), "ab", "eos"))["text"] == "ab</s>"
    assert tgi._token(served, Step(Drawn(end), "", "eos"))["text"] == "</s>"
    assert tgi._token(served, Step(Drawn(5), "ab"))["text"] == "ab"


def test_adapters_may_have_the_names_that_clients_of_tgi_send(made: Service) -> None:
    models = dict(made.models)
    assert made.model("tgi") is made.model(None) is made.model("") is models["m"]
    tuned = models["tgi"] = Served(models["m"].loaded, "tgi", "")
    assert Service(made.scheduler, models, "m").model("tgi") is tuned
    with pytest.raises(UnknownModel):
        made.model("other")
