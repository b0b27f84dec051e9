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

from skode import (
    CNFDensityEstimator,
    DensityDisplay,
    FlowDisplay,
    ForecastDisplay,
    LatentODEForecaster,
)
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


# ------------------------------------------------------------------ ForecastDisplay

FORECASTER = {"latent_dim": 2, "encoder_size": 4, "n_paths": 16, **QUICK, "tol": 0}


def record(n_rows=40, zone=None):
    """Return two channels at odd times, of which the second has gaps."""
    hours = np.sort(np.random.default_rng(0).uniform(0, 96, size=n_rows))
    stamps = pd.Timestamp("2024-03-30", tz=zone) + pd.to_timedelta(hours, unit="h")
    table = pd.DataFrame({"level": np.sin(hours), "flow": np.cos(hours)}, index=stamps)
    table.loc[stamps[::3], "flow"] = np.nan
    return table


def visits():
    """Return numeric times of three series, and one channel."""
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"id": np.repeat(["a", "b", "c"], 8), "day": rng.uniform(size=24)})
    return X, pd.Series(rng.normal(size=24), name="dose")


@pytest.fixture(scope="module")
def sensors():
    return LatentODEForecaster(context="1D", horizon="1D", **FORECASTER).fit(record())


@pytest.fixture(scope="module")
def clinic():
    return LatentODEForecaster(time="day", series="id", **FORECASTER).fit(*visits())


def seen_in(ax, label):
    """Return the points of the line with a label, as numbers."""
    (line,) = (line for line in ax.lines if line.get_label() == label)
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_a_forecast_has_a_panel_for_each_channel(sensors):
    known = record()
    later = known.index[-1] + pd.to_timedelta(np.arange(1, 30), unit="h")
    display = ForecastDisplay.from_estimator(sensors, later, coverage=(0.9, 0.5))
    assert display.coverage == [0.5, 0.9]
    np.testing.assert_allclose(
        display.median, sensors.predict_quantiles(later, [0.5]), rtol=1e-9
    )
    for place, coverage in enumerate(display.coverage):
        bounds = sensors.predict_interval(later, coverage).to_numpy()
        np.testing.assert_allclose(
            display.intervals[place], bounds.reshape(-1, 2, 2), rtol=1e-9
        )
    np.testing.assert_array_equal(display.times, later.to_numpy())
    assert display.observed is None
    assert display.paths is None
    # Ahead of what is known, its last context is drawn, and nothing where it is NaN.
    last_day = known[known.index >= known.index[-1] - pd.Timedelta("1D")]
    for ax, name in zip(display.ax_, ["level", "flow"], strict=True):
        assert ax.get_ylabel() == name
        assert len(ax.collections) == 2
        times, values = seen_in(ax, "known")
        seen = last_day[name].dropna()
        np.testing.assert_array_equal(times, seen.index.to_numpy())
        np.testing.assert_array_equal(values, seen)
    assert display.figure_ is display.ax_[0].figure


def test_bands_are_nested_and_the_widest_is_behind(sensors):
    later = record().index[-1] + pd.to_timedelta(np.arange(1, 9), unit="h")
    (ax, _) = ForecastDisplay.from_estimator(sensors, later).ax_
    wide, narrow = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert wide.y0 < narrow.y0 < narrow.y1 < wide.y1
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["90 % interval", "50 % interval", "median", "known"]


def test_observations_of_the_rows_are_drawn(sensors):
    later = record()[::-1]  # in any order
    later.index = later.index + pd.Timedelta("5D")
    display = ForecastDisplay.from_estimator(sensors, later, channels="flow")
    assert list(display.channel_names) == ["flow"]
    np.testing.assert_array_equal(display.observed[:, 0], later["flow"][::-1])
    times, values = seen_in(display.ax_, "observed")
    seen = later["flow"][::-1].dropna()
    np.testing.assert_array_equal(times, seen.index.to_numpy())
    np.testing.assert_array_equal(values, seen)


def test_past_forecasts_are_drawn_with_what_is_known_there(sensors):
    known = record()
    past = known.index[[10, 20]]
    display = ForecastDisplay.from_estimator(sensors, past)
    np.testing.assert_array_equal(display.known, known[10:21])


def test_paths_are_drawn_jointly(sensors):
    later = record().index[-1] + pd.to_timedelta(np.arange(1, 9), unit="h")
    display = ForecastDisplay.from_estimator(
        sensors, later, channels=[1], n_paths=3, random_state=0
    )
    expected = sensors.sample_paths(later, 3, random_state=0)["flow"].to_numpy()
    np.testing.assert_array_equal(display.paths[:, :, 0], expected.T)
    lines = [line.get_ydata() for line in display.ax_.lines[:3]]
    np.testing.assert_array_equal(lines, expected.T)


def test_one_series_of_several_is_chosen(clinic):
    X, y = visits()
    display = ForecastDisplay.from_estimator(clinic, X, y, series="b")
    rows = X[X["id"] == "b"].sort_values("day")
    np.testing.assert_array_equal(display.times, rows["day"])
    np.testing.assert_array_equal(display.observed[:, 0], y[rows.index])
    np.testing.assert_allclose(
        display.median[:, 0], clinic.predict_quantiles(rows, [0.5])[0.5], rtol=1e-6
    )
    assert display.ax_.get_xlabel() == "day"
    assert display.ax_.get_ylabel() == "dose"
    with pytest.raises(ValueError, match="series must name one of the 3 series of X"):
        ForecastDisplay.from_estimator(clinic, X)
    with pytest.raises(ValueError, match="got 'd'"):
        ForecastDisplay.from_estimator(clinic, X, series="d")


def test_a_history_is_what_is_known_of_a_series(clinic):
    history = pd.DataFrame({"id": "new", "day": [0.2, 0.1], "dose": [1.0, 2.0]})
    later = pd.DataFrame({"id": "new", "day": [0.5, 0.6]})
    display = ForecastDisplay.from_estimator(clinic, later, history=history)
    np.testing.assert_array_equal(display.known[:, 0], [2.0, 1.0])
    np.testing.assert_allclose(display.known_times, [0.1, 0.2])
    np.testing.assert_allclose(
        display.median[:, 0],
        clinic.predict_quantiles(later, [0.5], history=history)[0.5],
    )


@pytest.mark.filterwarnings("ignore:.*not seen in fit")
def test_a_series_of_which_nothing_is_known_is_drawn(clinic):
    later = pd.DataFrame({"id": "new", "day": [0.5, 0.6]})
    display = ForecastDisplay.from_estimator(clinic, later)
    assert display.known is None
    assert "known" not in [line.get_label() for line in display.ax_.lines]


@pytest.mark.parametrize("n_channels", [1, 2])
def test_arrays_have_forecasts_too(n_channels):
    hours, values = np.arange(30.0), rows(2, n_rows=30)[:, :n_channels]
    values = values[:, 0] if n_channels == 1 else values
    est = LatentODEForecaster(**FORECASTER).fit(hours[:, None], values)
    ahead = np.array([[31.0], [30.0]])
    display = ForecastDisplay.from_estimator(est, ahead, n_paths=2, random_state=0)
    np.testing.assert_array_equal(display.times, [30.0, 31.0])
    np.testing.assert_allclose(
        display.median[::-1].reshape(-1),
        est.predict_quantiles(ahead, [0.5]).reshape(-1),
        rtol=1e-6,
    )
    assert display.paths.shape == (2, 2, n_channels)
    expected = ["y"] if n_channels == 1 else ["y0", "y1"]
    assert list(display.channel_names) == expected


def test_zoned_stamps_are_drawn_in_the_hours_of_their_zone():
    table = record(zone="Europe/Berlin")  # clocks change within
    est = LatentODEForecaster(**FORECASTER).fit(table)
    display = ForecastDisplay.from_estimator(est, table.index[-3:])
    local = table.index[-3:].tz_localize(None)
    np.testing.assert_array_equal(display.times, local.to_numpy())
    assert display.time_name == "time (Europe/Berlin)"


@pytest.mark.parametrize(
    ("unit", "shown"), [("s", "minutes"), ("min", "hours"), ("D", "days")]
)
def test_time_differences_are_drawn_in_a_unit_that_fits(unit, shown):
    index = pd.to_timedelta(np.arange(200.0), unit=unit)
    table = pd.DataFrame({"level": np.sin(np.arange(200.0))}, index=index)
    est = LatentODEForecaster(**FORECASTER).fit(table)
    display = ForecastDisplay.from_estimator(est, index[-2:])
    assert display.time_name == f"time ({shown})"
    sizes = {"minutes": "1min", "hours": "1h", "days": "1D"}
    np.testing.assert_allclose(display.times, index[-2:] / pd.Timedelta(sizes[shown]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": ["level", "heat"]}, "channels must be positions below 2"),
        ({"coverage": 1.0}, "coverage must lie between 0 and 1"),
        ({"coverage": []}, "coverage must lie between 0 and 1"),
        ({"ax": np.empty(3, dtype=object)}, "ax must be axes, or an array"),
    ],
)
def test_wrong_arguments_of_a_forecast(sensors, wrong, message):
    with pytest.raises(ValueError, match=message):
        ForecastDisplay.from_estimator(sensors, record().index[:3], **wrong)


def test_no_forecaster(flows):
    with pytest.raises(TypeError, match="has no intervals to draw"):
        ForecastDisplay.from_estimator(flows[2], rows(2))
    with pytest.raises(NotFittedError):
        ForecastDisplay.from_estimator(LatentODEForecaster(), record().index)


def test_forecasts_are_drawn_on_given_axes(sensors):
    later = record().index[-1] + pd.to_timedelta([1, 2], unit="h")
    figure, axes = plt.subplots(2, 2, sharex=True)
    display = ForecastDisplay.from_estimator(sensors, later, ax=axes[:, 1])
    assert list(display.ax_) == list(axes[:, 1])
    assert display.plot(axes[:, 0]) is display
    assert display.figure_ is figure
    _, ax = plt.subplots()
    panels = display.plot(ax).ax_
    assert not ax.axison
    assert len(panels) == 2
    one = ForecastDisplay.from_estimator(sensors, later, channels=0)
    _, ax = plt.subplots()
    assert one.plot(ax).ax_ is ax


def test_styles_of_a_forecast_reach_matplotlib(sensors):
    display = ForecastDisplay.from_estimator(
        sensors,
        record().index[:5],
        channels=0,
        line_kw={"linestyle": ":"},
        band_kw={"alpha": 0.2},
        data_kw={"marker": "s"},
    )
    styles = {line.get_label(): line for line in display.ax_.lines}
    assert styles["median"].get_linestyle() == ":"
    assert styles["known"].get_marker() == "s"
    assert [band.get_alpha() for band in display.ax_.collections] == [0.2, 0.2]


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


@pytest.mark.parametrize("display", [DensityDisplay, FlowDisplay, ForecastDisplay])
def test_matplotlib_may_be_missing(flows, display, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="from_estimator requires matplotlib"):
        display.from_estimator(flows[2], rows(2))
