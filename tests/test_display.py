"""Displays: what they compute, where they draw, and what they refuse."""

import builtins

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import CNFDensityEstimator, DensityDisplay, FlowDisplay
from tests.tables import blobs, classifier

QUICK = {
    "hidden_layer_sizes": (8,),
    "max_iter": 3,
    "tol": 1.0,
    "compile": False,
    "random_state": 0,
}
NAMES = ["length", "width", "height", "depth"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def rows(n_features, n_rows=60):
    return np.random.default_rng(0).normal(2.0, 3.0, size=(n_rows, n_features))


def frame(n_features):
    return pd.DataFrame(rows(n_features), columns=NAMES[:n_features])


@pytest.fixture(scope="module")
def flows():
    """Fitted flows by their number of columns."""
    return {k: CNFDensityEstimator(**QUICK).fit(rows(k)) for k in (1, 2, 4)}


@pytest.fixture(scope="module")
def labelled():
    """Return a flow conditional on labels, and its table."""
    codes_and_rows = blobs(n_classes=2, n_features=2)
    X, y = codes_and_rows[0], np.array(["a", "b"])[codes_and_rows[1]]
    flow = CNFDensityEstimator(conditional=True, **{**QUICK, "max_iter": 30})
    return flow.fit(X, y), X, y


def mass(display):
    """Return the integral of the density over the grid."""
    cell = np.prod([axis[1] - axis[0] for axis in display.grid])
    return np.exp(display.log_density).sum() * cell


# ------------------------------------------------------------------ DensityDisplay


def test_one_column_is_a_curve_over_a_histogram_and_a_rug(flows):
    X = rows(1)
    display = DensityDisplay.from_estimator(flows[1], X, grid_resolution=50)
    (grid,) = display.grid
    assert grid.shape == display.log_density.shape == (250,)
    np.testing.assert_array_equal(
        display.log_density, flows[1].score_samples(grid[:, None])
    )
    np.testing.assert_array_equal(display.data, X)
    assert display.figure_ is display.ax_.figure
    assert display.ax_.get_xlabel() == "x0"
    rug, curve = display.ax_.lines
    np.testing.assert_array_equal(rug.get_xdata(), X[:, 0])
    np.testing.assert_array_equal(curve.get_ydata(), np.exp(display.log_density))
    bars = display.ax_.patches
    assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)


def test_two_columns_are_regions_under_the_rows(flows):
    X = rows(2)
    display = DensityDisplay.from_estimator(flows[2], X, grid_resolution=30)
    x, y = display.grid
    assert display.log_density.shape == (30, 30)
    # The second column varies along the first axis, as contours have it.
    np.testing.assert_allclose(
        display.log_density[7, 3], flows[2].score_samples([[x[3], y[7]]])[0], rtol=1e-5
    )
    regions, dots = display.ax_.collections
    assert len(regions.levels) == 6 + 1
    np.testing.assert_array_equal(dots.get_offsets(), X)
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("x0", "x1")


def test_regions_hold_their_share_of_the_probability():
    X = rows(2, n_rows=400)
    mixture = GaussianMixture(1, random_state=0).fit(X)
    display = DensityDisplay.from_estimator(mixture, X, levels=(0.5, 0.9))
    log_levels = np.log(display.ax_.collections[0].levels[:-1])
    log_density = display.log_density - display.log_density.max()
    # Of a normal distribution in the plane, exp(-r^2 / 2) of the mass is beyond r. The
    # axes end where the rows do, so that a little of it is missing.
    np.testing.assert_allclose(np.exp(log_levels), [0.1, 0.5], atol=0.02)
    assert log_density.max() == 0


def test_columns_may_be_drawn_in_another_order(flows):
    X = rows(2)
    straight = DensityDisplay.from_estimator(flows[2], X, grid_resolution=9)
    swapped = DensityDisplay.from_estimator(
        flows[2], X, columns=[1, 0], grid_resolution=9
    )
    np.testing.assert_array_equal(swapped.data, X[:, ::-1])
    np.testing.assert_allclose(swapped.log_density, straight.log_density.T, rtol=1e-5)


def test_more_columns_are_pairs_of_samples_and_rows(flows):
    X = rows(4)
    display = DensityDisplay.from_estimator(flows[4], X, n_samples=200, random_state=1)
    np.testing.assert_array_equal(display.samples, flows[4].sample(200, random_state=1))
    assert display.log_density is None
    assert display.ax_.shape == (4, 4)
    drawn = np.array([[ax is not None for ax in row] for row in display.ax_])
    np.testing.assert_array_equal(drawn, np.tri(4, dtype=bool))
    assert len(display.figure_.axes) == 10
    np.testing.assert_array_equal(
        display.ax_[2, 1].collections[-1].get_offsets(), X[:, [1, 2]]
    )
    assert [ax.get_xlabel() for ax in display.ax_[3]] == ["x0", "x1", "x2", "x3"]


def test_repeated_values_are_drawn_by_samples():
    X = rows(1, n_rows=200)
    X[:80] = 0.0  # a peak that no grid sees
    flow = CNFDensityEstimator(**QUICK).fit(X)
    display = DensityDisplay.from_estimator(flow, X, random_state=0)
    assert display.log_density is None
    assert 0.3 < np.mean(display.samples == 0) < 0.5
    peakless = DensityDisplay.from_estimator(flow, X, kind="density")
    assert mass(peakless) < 0.8


def test_samples_may_be_asked_for(flows):
    display = DensityDisplay.from_estimator(flows[2], rows(2), kind="samples")
    assert display.samples.shape == (5000, 2)
    assert display.ax_.shape == (2, 2)


@pytest.mark.parametrize("columns", [["width", "depth"], [1, 3], np.array([1, 3])])
def test_columns_are_chosen_by_name_and_position(columns):
    X = frame(4)
    mixture = GaussianMixture(2, random_state=0).fit(X)
    display = DensityDisplay.from_estimator(mixture, X, columns=columns)
    assert list(display.feature_names) == ["width", "depth"]
    assert display.ax_.shape == (2, 2)
    np.testing.assert_array_equal(display.data, X[["width", "depth"]])


def test_one_column_of_several_is_two_histograms(flows):
    display = DensityDisplay.from_estimator(flows[4], rows(4), columns=2)
    assert display.samples.shape == (5000, 1)
    assert display.ax_.shape == (1, 1)


def test_a_wide_table_shows_five_columns():
    X = rows(7)
    mixture = GaussianMixture(1, random_state=0).fit(X)
    display = DensityDisplay.from_estimator(mixture, X, n_samples=100)
    assert display.feature_names == ["x0", "x1", "x2", "x3", "x4"]


@pytest.mark.parametrize(
    "other", [KernelDensity(), GaussianMixture(2, random_state=0)], ids=repr
)
@pytest.mark.parametrize("n_features", [1, 2, 3])
def test_other_density_estimators(other, n_features):
    X = rows(n_features)
    display = DensityDisplay.from_estimator(other.fit(X), X, random_state=0)
    if n_features < 3:
        assert 0.8 < mass(display) < 1.01
    else:
        assert display.samples.shape == (5000, 3)


def test_frames_are_passed_on_as_frames_and_name_the_axes():
    X = frame(2)
    flow = CNFDensityEstimator(**QUICK).fit(X)
    display = DensityDisplay.from_estimator(flow, X, grid_resolution=30)
    assert display.ax_.get_ylabel() == "width"
    with pytest.raises(ValueError, match="X must have the columns of fit"):
        DensityDisplay.from_estimator(flow, X[["width", "length"]])


def test_a_pipeline_is_drawn_in_the_units_of_its_last_step():
    X = frame(2)
    pipeline = make_pipeline(StandardScaler(), GaussianMixture(1, random_state=0))
    display = DensityDisplay.from_estimator(pipeline.fit(X), X)
    np.testing.assert_allclose(display.data, pipeline[:-1].transform(X))
    assert 0.8 < mass(display) < 1.01
    assert FlowDisplay.from_estimator(
        make_pipeline(PCA(2), CNFDensityEstimator(**QUICK)).fit(rows(4)), rows(4)
    ).paths.shape == (60, 41, 2)


def test_a_conditional_density_is_drawn_given_y(labelled):
    flow, X, y = labelled
    displays = {
        label: DensityDisplay.from_estimator(
            flow, X[y == label], y=label, grid_resolution=40
        )
        for label in ("a", "b")
    }
    for label, display in displays.items():
        points = [[display.grid[0][3], display.grid[1][5]]]
        np.testing.assert_allclose(
            display.log_density[5, 3], flow.score_samples(points, [label])[0], rtol=1e-5
        )
    pairs = DensityDisplay.from_estimator(flow, X, y="a", columns=[0], random_state=0)
    np.testing.assert_array_equal(
        pairs.samples, flow.sample(5000, random_state=0, y="a")[:, [0]]
    )
    for given, got in ((None, "none"), (y, "shape"), (y[:, None], "shape")):
        for display in (DensityDisplay, FlowDisplay):
            with pytest.raises(ValueError, match=f"given one condition.* got {got}"):
                display.from_estimator(flow, X, y=given)


def test_covariates_of_a_conditional_density():
    X, y = rows(1), rows(2)
    flow = CNFDensityEstimator(conditional=True, **QUICK).fit(X, y)
    display = DensityDisplay.from_estimator(flow, X, y=[1.0, 2.0])
    (grid,) = display.grid
    np.testing.assert_allclose(
        display.log_density[9], flow.score_samples([[grid[9]]], [[1.0, 2.0]])[0], 1e-5
    )
    assert FlowDisplay.from_estimator(flow, y=[1.0, 2.0]).paths.shape == (300, 41, 1)


def test_no_density_at_some_rows_is_no_peak():
    X = rows(1)
    model = KernelDensity(kernel="tophat", bandwidth=2.0).fit(X[:20])
    display = DensityDisplay.from_estimator(model, X)
    assert np.isneginf(display.log_density).any()
    assert mass(display) == pytest.approx(1.0, abs=0.02)


def test_a_density_without_samples_is_always_drawn():
    X = rows(2)
    X[:30] = 0.0
    analysis = PCA(1).fit(np.column_stack([X[:, 0], X[:, 0] + 1e-3 * X[:, 1]]))
    display = DensityDisplay.from_estimator(analysis, X)
    assert display.samples is None


def test_a_density_without_samples_is_refused_for_pairs():
    X = rows(3)
    analysis = PCA(2).fit(X)  # has score_samples, but no sample
    with pytest.raises(TypeError, match="PCA cannot draw samples"):
        DensityDisplay.from_estimator(analysis, X)


@pytest.mark.parametrize("other", [StandardScaler(), IsolationForest()], ids=repr)
def test_no_density_estimator(other):
    X = rows(2)
    with pytest.raises(TypeError, match="has no log-density to draw"):
        DensityDisplay.from_estimator(other.fit(X), X)


@pytest.mark.parametrize("display", [DensityDisplay, FlowDisplay])
def test_an_estimator_must_be_fitted(display):
    with pytest.raises(NotFittedError):
        display.from_estimator(CNFDensityEstimator(), rows(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"X": rows(3)}, "X must have shape"),
        ({"columns": [2]}, "columns must be positions below 2"),
        ({"columns": [-1]}, "columns must be positions below 2"),
        ({"columns": "width"}, "columns must be positions below 2 or names"),
        ({"columns": []}, "columns must be positions"),
        ({"kind": "curve"}, "kind must be 'auto', 'density' or 'samples'"),
        ({"kind": "density", "columns": [0]}, "kind='samples' draws those"),
        ({"grid_resolution": 1}, "grid_resolution must be at least 2"),
        ({"levels": (0.5, 1.0)}, "levels must be shares"),
        ({"ax": np.empty(3, dtype=object)}, "ax must be axes, or an array"),
    ],
)
def test_wrong_arguments_of_a_density(flows, wrong, message):
    with pytest.raises(ValueError, match=message):
        DensityDisplay.from_estimator(
            flows[2], **{"X": rows(2), "grid_resolution": 5, **wrong}
        )


def test_styles_reach_matplotlib(flows):
    display = DensityDisplay.from_estimator(
        flows[2],
        rows(2),
        grid_resolution=20,
        density_kw={"cmap": "magma"},
        data_kw={"s": 7.0},
    )
    regions, dots = display.ax_.collections
    assert regions.get_cmap().name == "magma"
    assert dots.get_sizes() == [7.0]
    (line,) = DensityDisplay.from_estimator(
        flows[1], rows(1), density_kw={"color": "red"}, data_kw={"bins": 3}
    ).ax_.lines[1:]
    assert line.get_color() == "red"


# ------------------------------------------------------------------ FlowDisplay


def test_paths_lead_from_the_base_to_samples(flows):
    display = FlowDisplay.from_estimator(flows[2], n_samples=20, random_state=0)
    drawn = flows[2].sample(20, random_state=0)
    np.testing.assert_allclose(display.paths[:, -1], drawn, atol=1e-2)
    np.testing.assert_array_equal(
        display.paths, flows[2].trajectory(drawn, np.linspace(0, 1, 41))
    )
    assert len(display.ax_.lines) == 20
    np.testing.assert_array_equal(
        display.ax_.collections[0].get_offsets(), display.paths[:, 0]
    )


def test_given_rows_are_followed(flows):
    display = FlowDisplay.from_estimator(flows[4], rows(4), columns=[3, 1], n_times=5)
    np.testing.assert_allclose(display.paths[:, -1], rows(4)[:, [3, 1]], atol=1e-3)
    assert display.ax_.get_xlabel() == "x3"


def test_paths_of_one_column_run_over_time(flows):
    display = FlowDisplay.from_estimator(flows[1], n_samples=7)
    assert len(display.ax_.lines) == 7
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("t", "x0")


def test_a_single_row_has_snapshots_too(flows):
    FlowDisplay.from_estimator(flows[2], rows(2)[:1], kind="snapshots")


@pytest.mark.parametrize("n_features", [1, 2, 4])
def test_snapshots_are_panels_in_the_order_of_time(flows, n_features):
    display = FlowDisplay.from_estimator(
        flows[n_features], n_samples=30, kind="snapshots", n_snapshots=3
    )
    assert [ax.get_title() for ax in display.ax_] == ["t = 0", "t = 0.5", "t = 1"]
    if n_features > 1:
        first, _, last = (ax.collections[0] for ax in display.ax_)
        np.testing.assert_array_equal(last.get_offsets(), display.paths[:, -1])
        # A row keeps its colour.
        np.testing.assert_array_equal(first.get_facecolor(), last.get_facecolor())


def test_a_conditional_flow_is_drawn_given_y(labelled):
    flow, X, y = labelled
    display = FlowDisplay.from_estimator(flow, X[y == "b"], y="b")
    np.testing.assert_allclose(display.paths[:, -1], X[y == "b"], atol=1e-2)
    assert FlowDisplay.from_estimator(flow, y="a", n_samples=5).paths.shape[0] == 5


@pytest.mark.parametrize("other", ["mixture", "classifier"])
def test_no_flow(other):
    X, y = blobs(n_features=2)
    model = GaussianMixture() if other == "mixture" else classifier(tol=1.0)
    with pytest.raises(TypeError, match="is no flow"):
        FlowDisplay.from_estimator(model.fit(X, y), X)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"columns": [0, 1, 2]}, "columns must be one or two"),
        ({"kind": "film"}, "kind must be 'paths' or 'snapshots'"),
        ({"kind": "snapshots", "n_snapshots": 50}, "n_snapshots must be at least 1"),
    ],
)
def test_wrong_arguments_of_a_flow(flows, wrong, message):
    with pytest.raises(ValueError, match=message):
        FlowDisplay.from_estimator(flows[4], n_samples=5, **wrong)


# ------------------------------------------------------------------ both


@pytest.mark.parametrize("n_features", [1, 2])
@pytest.mark.parametrize("display", [DensityDisplay, FlowDisplay])
def test_axes_passed_in_are_drawn_on(flows, display, n_features):
    figure, ax = plt.subplots()
    drawn = display.from_estimator(flows[n_features], rows(n_features), ax=ax)
    assert drawn.ax_ is ax
    assert drawn.figure_ is figure
    assert ax.has_data()
    assert figure.axes == [ax]


def test_axes_give_up_their_place_to_panels(flows):
    figure, (left, right) = plt.subplots(ncols=2)
    density = DensityDisplay.from_estimator(flows[4], rows(4), ax=left)
    flow = FlowDisplay.from_estimator(flows[4], rows(4), kind="snapshots", ax=right)
    assert density.figure_ is flow.figure_ is figure
    assert not left.axison
    assert not right.axison
    place = left.get_position()
    for ax in density.ax_[np.tri(4, dtype=bool)]:
        assert place.x0 - 1e-6 <= ax.get_position().x0
        assert ax.get_position().x1 <= place.x1 + 1e-6
    with pytest.raises(ValueError, match="ax must be axes of a grid"):
        DensityDisplay.from_estimator(
            flows[4], rows(4), ax=figure.add_axes((0, 0, 1, 1))
        )


def test_arrays_of_axes_are_drawn_on(flows):
    figure, axes = plt.subplots(2, 2)
    drawn = DensityDisplay.from_estimator(flows[4], rows(4), columns=[0, 1], ax=axes)
    assert drawn.ax_[1, 0] is axes[1, 0]
    assert drawn.figure_ is figure
    _, axes = plt.subplots(ncols=3)
    flow = FlowDisplay.from_estimator(
        flows[2], kind="snapshots", n_snapshots=3, ax=list(axes)
    )
    assert list(flow.ax_) == list(axes)


def test_a_display_is_drawn_again_elsewhere(flows):
    density = DensityDisplay.from_estimator(flows[2], rows(2), grid_resolution=10)
    flow = FlowDisplay.from_estimator(flows[2], n_samples=9)
    for display in (density, flow):
        _, ax = plt.subplots()
        assert display.plot(ax) is display
        assert display.ax_ is ax
    assert len(flow.plot(kind="snapshots").ax_) == 5


def test_a_column_of_one_value_has_axes(flows):
    display = DensityDisplay.from_estimator(flows[2], np.ones((5, 2)))
    assert display.ax_.get_xlim() == (0.5, 1.5)


@pytest.mark.parametrize("display", [DensityDisplay, FlowDisplay])
def test_matplotlib_may_be_missing(flows, display, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="from_estimator requires matplotlib"):
        display.from_estimator(flows[2], rows(2))
