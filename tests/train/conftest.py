"""Random Llamas whose kernels divide over a mesh, packed blocks included, and runs that draw nothing."""

import pathlib

import pytest

from jlora.train.reporting.metrics import CURVES


@pytest.fixture(scope="session")
def model_folder(make_llama):
    return make_llama(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=48)


@pytest.fixture(scope="session")
def small_model_folder(make_llama):
    """Its packed blocks divide over two devices of an axis; those of `model_folder` over four."""
    return make_llama(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=48)


@pytest.fixture(scope="module", autouse=True)
def runs_draw_nothing():
    """Curves take as long to draw as a run's steps; reporting/test_metrics.py and cli/test_train.py look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlora.train.results.plot_curves", lambda workdir, panels: pathlib.Path(workdir, CURVES).touch())
        yield
