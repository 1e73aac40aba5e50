"""What other libraries say while they work for a run is dropped, and only that."""

from __future__ import annotations

import logging

import pytest
from huggingface_hub import utils as hub_utils
from transformers.utils import logging as transformers_logging

from hf_awq_offload.logs import without_message, without_offload_message, without_progress_bars


@pytest.fixture(autouse=True)
def bars_as_before():
    shown, quiet = transformers_logging.is_progress_bar_enabled(), hub_utils.are_progress_bars_disabled()
    yield
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    (hub_utils.disable_progress_bars if quiet else hub_utils.enable_progress_bars)()


def test_one_message_is_dropped_and_all_others_are_logged(caplog):
    logger = logging.getLogger("accelerate.big_modeling")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        with without_offload_message():
            logger.warning("Some parameters are on the meta device because they were offloaded to the disk.")
            logger.warning("Something else.")
        logger.warning("Some parameters are on the meta device because of the caller's own call.")
    assert caplog.messages == [
        "Something else.",
        "Some parameters are on the meta device because of the caller's own call.",
    ]


def test_the_filter_goes_after_an_error(caplog):
    with pytest.raises(RuntimeError), without_message("some.logger", "a"):
        raise RuntimeError
    logging.getLogger("some.logger").warning("a")
    assert caplog.messages == ["a"]


@pytest.mark.parametrize("hub_is_quiet", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before_afterwards(shown, hub_is_quiet):
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    (hub_utils.disable_progress_bars if hub_is_quiet else hub_utils.enable_progress_bars)()
    with without_progress_bars():
        assert not transformers_logging.is_progress_bar_enabled()
        assert hub_utils.are_progress_bars_disabled() == hub_is_quiet
    assert transformers_logging.is_progress_bar_enabled() == shown
    assert hub_utils.are_progress_bars_disabled() == hub_is_quiet
