"""Plots of fitted estimators: `DensityDisplay`, `FlowDisplay`, `ForecastDisplay`.

n rows, k drawn columns or channels, T times, G points of a grid along an axis, S paths.
matplotlib is imported late, since it may be missing.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from sklearn.base import is_outlier_detector
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skode._border import check_matplotlib_support

__all__ = ["DensityDisplay", "FlowDisplay", "ForecastDisplay"]

MODEL, DATA, START = "#2a6f97", "#d1603d", "#8d99ae"
KNOWN = "#3d4451"
_MOST_COLUMNS = 5
"""Of a picture of pairs, unless columns are chosen."""
_STEEP, _MOST_UNSEEN = 2.0, 0.05
"""Nats over half a step of a grid, at a share of the rows: the grid is too coarse."""
_SHADES = "#e3edf3", "#5b94b8"
_WHEEL = MODEL, "#6a994e", "#e9b44c", DATA, "#8e5572", MODEL
_CURVE = 5
"""Points of a curve, for each point along an axis of a plane."""


class DensityDisplay:
    """A density and the rows it should describe.

    Make one with `from_estimator`, which chooses the picture by the number of columns
    of the model, and of `columns`:

    - one column: the density as a curve, over a histogram and a rug of the rows;
    - two: the density as regions that hold given shares of its probability, under the
      rows;
    - some columns of more, whose density would be an integral, and columns with
      repeated values, at which it is a peak too narrow to draw: samples of the model
      beside the rows, as histograms of each column and a plane for each pair.

    Parameters
    ----------
    data : ndarray of shape (n_samples, n_columns)
        The rows.
    feature_names : sequence of str, of length n_columns
        Labels of the axes.
    grid : tuple of one or two ndarrays of shape (n_points,), default=None
        Coordinates along each axis at which the density is known.
    log_density : ndarray of shape (n_points,) or (n_points, n_points), default=None
        In nats, at the points of the grid; the second column varies along the first
        axis, as matplotlib's contours have it.
    samples : ndarray of shape (n_draws, n_columns), default=None
        Rows drawn from the model, instead of `grid` and `log_density`.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of shape (n_columns, n_columns)
        Where the picture is; with `samples`, an array, with None above its diagonal.
    figure_ : matplotlib Figure
        The figure that holds it.

    See Also
    --------
    FlowDisplay : How the rows of a flow come about.
    sklearn.inspection.DecisionBoundaryDisplay : The like for classifiers.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.mixture import GaussianMixture
    >>> from skode import DensityDisplay
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> mixture = GaussianMixture(2, random_state=0).fit(X)
    >>> display = DensityDisplay.from_estimator(mixture, X)
    >>> display.log_density.shape
    (100, 100)
    """

    def __init__(
        self, *, data, feature_names, grid=None, log_density=None, samples=None
    ):
        self.data = data
        self.feature_names = feature_names
        self.grid = grid
        self.log_density = log_density
        self.samples = samples

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        *,
        y=None,
        columns=None,
        kind="auto",
        grid_resolution=100,
        n_samples=5000,
        random_state=None,
        ax=None,
        levels=(0.1, 0.3, 0.5, 0.7, 0.9, 0.99),
        density_kw=None,
        data_kw=None,
    ):
        """Plot the density of a fitted estimator.

        Parameters
        ----------
        estimator : estimator instance
            `CNFDensityEstimator`, or another fitted model whose `score_samples` are
            log-densities, such as `KernelDensity` and `GaussianMixture`; for columns of
            many, it must `sample`. A `Pipeline` that ends in one is drawn in the units
            that its last step sees, for which `score_samples` holds.
        X : array-like of shape (n_samples, n_features)
            Rows to draw beside the density, which also say how far the axes go.
        y : scalar or array-like of shape (n_covariates,), default=None
            The one condition that the density is drawn given, if it is conditional: a
            label, or a value of each covariate. `X` should be rows for which it holds.
        columns : sequence of int or str, default=None
            Which columns to draw, by position or name; None: all of them, but the first
            five of more.
        kind : {"auto", "density", "samples"}, default="auto"
            "density": the density at the points of a grid, for models of one or two
            columns. "samples": rows drawn from the model, for any. "auto": the density,
            but samples of more columns, and where the grid is too coarse for it, as
            for narrow peaks at values that many rows share.
        grid_resolution : int, default=100
            Points along each axis of a plane; a curve has five times as many.
        n_samples : int, default=5000
            How many rows to draw from the model for a picture of samples.
        random_state : int, RandomState instance or None, default=None
            Of these rows.
        ax : matplotlib Axes or array-like of Axes, default=None
            See `plot`.
        levels : sequence of float, default=(0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
            See `plot`.
        density_kw, data_kw : dict, default=None
            See `plot`.

        Returns
        -------
        display : DensityDisplay
            With the picture drawn.

        Raises
        ------
        TypeError
            If the estimator has no log-density.
        ValueError
            If `columns` are not there, `X` has other columns than the estimator, or `y`
            is not one condition where the density wants one.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        if grid_resolution < 2:
            raise ValueError(
                f"grid_resolution must be at least 2, got {grid_resolution}."
            )
        estimator, data, names = _rows_seen(estimator, X)
        if not hasattr(estimator, "score_samples") or is_outlier_detector(estimator):
            raise TypeError(
                f"{type(estimator).__name__} has no log-density to draw: pass a "
                "density estimator, such as CNFDensityEstimator or GaussianMixture."
            )
        _check_condition(estimator, y)
        if kind not in ("auto", "density", "samples"):
            raise ValueError(
                f"kind must be 'auto', 'density' or 'samples', got {kind!r}."
            )
        chosen = _positions(columns, names)
        whole = len(names) <= 2 and sorted(chosen) == list(range(len(names)))
        if kind == "density" and not whole:
            raise ValueError(
                f"kind='density' draws all columns of a model of one or two, not "
                f"{len(chosen)} of {len(names)}: kind='samples' draws those."
            )
        shown = {
            "data": data[:, chosen],
            "feature_names": [names[column] for column in chosen],
        }
        if whole and kind != "samples":
            points = grid_resolution * (_CURVE if len(chosen) == 1 else 1)
            grid = tuple(
                np.linspace(*_limits(column), points) for column in shown["data"].T
            )
            model = _Density(estimator, np.argsort(chosen), y)
            must = kind == "density" or not hasattr(estimator, "sample")
            if must or _is_seen(model, grid, shown["data"]):
                shown["grid"] = grid
                shown["log_density"] = model(np.stack(np.meshgrid(*grid), axis=-1))
        if "grid" not in shown:
            shown["samples"] = _draw(estimator, n_samples, random_state, y)[:, chosen]
        return cls(**shown).plot(
            ax=ax, levels=levels, density_kw=density_kw, data_kw=data_kw
        )

    def plot(
        self,
        ax=None,
        *,
        levels=(0.1, 0.3, 0.5, 0.7, 0.9, 0.99),
        density_kw=None,
        data_kw=None,
    ):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of Axes, default=None
            Where to draw; None makes a figure. With `samples` and several columns, an
            array of shape (n_columns, n_columns), or axes that give up their place to
            so many.
        levels : sequence of float, default=(0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
            Shares of the probability. Each is that of a region of highest density.
        density_kw : dict, default=None
            Passed to what draws the model: `plot` for a curve, `contourf` for a
            density or samples of pairs.
        data_kw : dict, default=None
            Passed to what draws the rows: `hist` for one column, `scatter` for two.

        Returns
        -------
        display : DensityDisplay
            This display, with `ax_` and `figure_`.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        _check_levels(levels)
        density_kw, data_kw = density_kw or {}, data_kw or {}
        k = len(self.feature_names)
        if self.samples is not None:
            self.ax_ = _panels(ax, k, k, 2.2, triangle=True)
            self.figure_ = self.ax_[0, 0].figure
            self._draw_pairs(levels, density_kw, data_kw)
            return self
        (self.ax_,) = _panels(ax, 1, 1, 4.8).flat
        self.figure_ = self.ax_.figure
        if k == 1:
            self._draw_curve(density_kw, data_kw)
        else:
            density = np.exp(self.log_density - self.log_density.max())
            _regions(self.ax_, *self.grid, density, levels, density_kw)
            _dots(self.ax_, self.data, data_kw)
            self.ax_.set(
                xlabel=self.feature_names[0],
                ylabel=self.feature_names[1],
                xlim=_ends(self.grid[0]),
                ylim=_ends(self.grid[1]),
            )
        return self

    def _draw_curve(self, density_kw, data_kw):
        (grid,), ax = self.grid, self.ax_
        bins = _bins(len(self.data), _ends(grid))
        _histogram(ax, self.data[:, 0], bins, data_kw)
        rug = {"color": DATA, "alpha": 0.4, "linestyle": "none", "marker": "|"}
        at_the_bottom = ax.get_xaxis_transform()
        ax.plot(
            self.data, np.full(len(self.data), 0.02), transform=at_the_bottom, **rug
        )
        style = {"color": MODEL, "label": "density", **density_kw}
        ax.plot(grid, np.exp(self.log_density), **style)
        ax.set(xlabel=self.feature_names[0], ylabel="density", xlim=_ends(grid))
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)

    def _draw_pairs(self, levels, density_kw, data_kw):
        names, k = self.feature_names, len(self.feature_names)
        limits = [_limits(column) for column in self.data.T]
        for row, column in zip(*np.tril_indices(k), strict=True):
            ax = self.ax_[row, column]
            if row == column:
                bins = _bins(len(self.data), limits[row])
                _histogram(ax, self.data[:, row], bins, data_kw if k == 1 else {})
                outline = {"color": MODEL, "histtype": "step", "label": "samples"}
                _histogram(ax, self.samples[:, row], bins, {**outline, "alpha": 1.0})
                ax.set_yticks([])
            else:
                x, y = self.samples[:, [column, row]].T
                map_ = _smooth_histogram(x, y, limits[column], limits[row])
                _regions(ax, *map_, levels, density_kw)
                _dots(ax, self.data[:, [column, row]], data_kw)
                ax.set_ylim(limits[row])
            ax.set_xlim(limits[column])
            ax.tick_params(labelbottom=row == k - 1, labelleft=column == 0 < row)
            if row == k - 1:
                ax.set_xlabel(names[column])
            if column == 0 < row:
                ax.set_ylabel(names[row])
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if k > 1 else {}
        legend = self.ax_[0, 0].legend(frameon=False, **place)
        legend.set_in_layout(False)  # the panels beside it are empty


class FlowDisplay:
    """The way of rows from the base, t = 0, to the data, t = 1.

    Make one with `from_estimator`. All times are drawn in the units of the data, so
    that what `marginals` and `standardize` do is done at t = 0 already. With
    ``marginals=None`` the base is a normal distribution in the picture, too.

    Parameters
    ----------
    t : ndarray of shape (n_times,)
        Times.
    paths : ndarray of shape (n_samples, n_times, n_columns)
        Where each row is at each time; one or two columns.
    feature_names : sequence of str, of length n_columns
        Labels of the axes.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of shape (n_snapshots,)
        Where the picture is; with ``kind="snapshots"``, an array.
    figure_ : matplotlib Figure
        The figure that holds it.

    See Also
    --------
    DensityDisplay : What density the flow leads to.

    Examples
    --------
    >>> import numpy as np
    >>> from skode import CNFDensityEstimator, FlowDisplay
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> flow = CNFDensityEstimator(max_iter=5, tol=1, random_state=0).fit(X)
    >>> display = FlowDisplay.from_estimator(flow, n_samples=50, random_state=0)
    >>> display.paths.shape
    (50, 41, 2)
    """

    def __init__(self, *, t, paths, feature_names):
        self.t = t
        self.paths = paths
        self.feature_names = feature_names

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X=None,
        *,
        y=None,
        columns=None,
        n_samples=300,
        n_times=41,
        random_state=None,
        kind="paths",
        n_snapshots=5,
        ax=None,
        line_kw=None,
        scatter_kw=None,
    ):
        """Plot how samples of a fitted flow, or given rows, come about.

        Parameters
        ----------
        estimator : CNFDensityEstimator or Pipeline
            Fitted. A `Pipeline` that ends in one is drawn in the units that its last
            step sees.
        X : array-like of shape (n_samples, n_features), default=None
            Rows to follow; None: samples of the flow.
        y : scalar or array-like of shape (n_covariates,), default=None
            The one condition that all rows are followed given, if the flow is
            conditional: a label, or a value of each covariate.
        columns : sequence of int or str, default=None
            One or two columns to draw, by position or name; None: the first two.
        n_samples : int, default=300
            How many rows to draw from the flow, without `X`.
        n_times : int, default=41
            Times from 0 to 1.
        random_state : int, RandomState instance or None, default=None
            Of the samples.
        kind : {"paths", "snapshots"}, default="paths"
            See `plot`.
        n_snapshots : int, default=5
            See `plot`.
        ax : matplotlib Axes or array-like of Axes, default=None
            See `plot`.
        line_kw, scatter_kw : dict, default=None
            See `plot`.

        Returns
        -------
        display : FlowDisplay
            With the picture drawn.

        Raises
        ------
        TypeError
            If the estimator is no flow.
        ValueError
            If `columns` are not there, or more than two, or `y` is not one condition
            where the flow wants one.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        estimator, rows, names = _rows_seen(estimator, X)
        if not hasattr(estimator, "trajectory") or not hasattr(estimator, "sample"):
            raise TypeError(
                f"{type(estimator).__name__} is no flow, whose rows could be followed: "
                "pass a CNFDensityEstimator."
            )
        _check_condition(estimator, y)
        chosen = _positions(columns, names, most=2)
        if len(chosen) > 2:
            raise ValueError(
                f"columns must be one or two, to be drawn in a plane, got {columns}."
            )
        if rows is None:
            rows = _draw(estimator, n_samples, random_state, y)
        t = np.linspace(0.0, 1.0, n_times)
        given = {} if y is None else {"y": _repeated(y, len(rows))}
        paths = estimator.trajectory(_labelled(estimator, rows), t, **given)
        display = cls(
            t=t,
            paths=paths[:, :, chosen],
            feature_names=[names[column] for column in chosen],
        )
        return display.plot(
            ax=ax,
            kind=kind,
            n_snapshots=n_snapshots,
            line_kw=line_kw,
            scatter_kw=scatter_kw,
        )

    def plot(
        self,
        ax=None,
        *,
        kind="paths",
        n_snapshots=5,
        line_kw=None,
        scatter_kw=None,
    ):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of Axes, default=None
            Where to draw; None makes a figure. For snapshots, an array of
            `n_snapshots`, or axes that give up their place to so many.
        kind : {"paths", "snapshots"}, default="paths"
            "paths": a line for each row, from a grey dot at t = 0 to a coloured one at
            t = 1; of one column, over time. "snapshots": small panels, one for each
            time, in which a row keeps the colour of where it started; of one column,
            histograms.
        n_snapshots : int, default=5
            How many panels, from t = 0 to t = 1.
        line_kw : dict, default=None
            Passed to `plot`, which draws the paths.
        scatter_kw : dict, default=None
            Passed to `scatter`, which draws the dots of snapshots and the ends of
            paths.

        Returns
        -------
        display : FlowDisplay
            This display, with `ax_` and `figure_`.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        if kind not in ("paths", "snapshots"):
            raise ValueError(f"kind must be 'paths' or 'snapshots', got {kind!r}.")
        line_kw, scatter_kw = line_kw or {}, scatter_kw or {}
        if kind == "paths":
            (self.ax_,) = _panels(ax, 1, 1, 4.8).flat
            self.figure_ = self.ax_.figure
            self._draw_paths(line_kw, scatter_kw)
        else:
            if not 1 <= n_snapshots <= len(self.t):
                raise ValueError(
                    f"n_snapshots must be at least 1 and at most the number of times, "
                    f"{len(self.t)}, got {n_snapshots}."
                )
            self.ax_ = _panels(ax, 1, n_snapshots, 2.2).ravel()
            self.figure_ = self.ax_[0].figure
            self._draw_snapshots(scatter_kw)
        return self

    def _draw_paths(self, line_kw, scatter_kw):
        ax, names = self.ax_, self.feature_names
        line = {"color": MODEL, "linewidth": 0.6, "alpha": 0.3, **line_kw}
        start = {"s": 6, "color": START, "zorder": 2, "linewidths": 0}
        end = {"s": 10, "color": MODEL, "zorder": 3, "linewidths": 0, **scatter_kw}
        if len(names) == 1:
            ax.plot(self.t, self.paths[:, :, 0].T, **line)
            ax.set(xlabel="t", ylabel=names[0], xlim=(self.t[0], self.t[-1]))
            return
        x, y = self.paths.transpose(2, 1, 0)  # each (T, n)
        ax.plot(x, y, **line)
        ax.scatter(x[0], y[0], label=f"t = {self.t[0]:g}", **start)
        ax.scatter(x[-1], y[-1], label=f"t = {self.t[-1]:g}", **end)
        ax.set(xlabel=names[0], ylabel=names[1])
        ax.legend(frameon=False)

    def _draw_snapshots(self, scatter_kw):
        names, k = self.feature_names, len(self.feature_names)
        limits = [_limits(column, 0.05) for column in self.paths.reshape(-1, k).T]
        at = np.linspace(0, len(self.t) - 1, len(self.ax_)).round().astype(int)
        dots = {"s": 8, "linewidths": 0}
        if not {"c", "color"} & scatter_kw.keys():
            dots["c"] = _hues(self.paths[:, 0])
        for ax, index in zip(self.ax_, at, strict=True):
            rows = self.paths[:, index]
            if k == 1:
                bins = _bins(len(rows), limits[0])
                _histogram(ax, rows[:, 0], bins, {"color": MODEL, "label": None})
                ax.set_yticks([])
            else:
                ax.scatter(*rows.T, **{**dots, **scatter_kw})
                ax.set_ylim(limits[1])
                ax.tick_params(labelleft=ax is self.ax_[0])
            ax.set(title=f"t = {self.t[index]:.2g}", xlabel=names[0], xlim=limits[0])
        if k == 2:
            self.ax_[0].set_ylabel(names[1])


class ForecastDisplay:
    """Forecasts of one series, and what was observed of it.

    Make one with `from_estimator`. Each channel has a panel: dots for what is known of
    the series, and for what was observed at the times of the forecasts, if that is
    given; a line for the median; bands for intervals; thin lines for sample paths.

    Parameters
    ----------
    times : ndarray of shape (n_times,)
        Times of the forecasts, increasing: stamps, or numbers.
    median : ndarray of shape (n_times, n_channels)
        Medians of the forecasts.
    intervals : ndarray of shape (n_coverages, n_times, n_channels, 2)
        Lower and upper bounds.
    coverage : sequence of float, of length n_coverages
        Probability of each interval, increasing.
    channel_names : sequence of str, of length n_channels
        Labels of the panels.
    time_name : str, default="time"
        Label of the time axis.
    known_times : ndarray of shape (n_known,), default=None
        When the series was observed.
    known : ndarray of shape (n_known, n_channels), default=None
        What the forecasts are conditioned on; NaN: not observed.
    observed : ndarray of shape (n_times, n_channels), default=None
        What was observed at the times of the forecasts; NaN: not observed.
    paths : ndarray of shape (n_paths, n_times, n_channels), default=None
        Observations as they may be, drawn jointly.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of shape (n_channels,)
        Where the picture is; of several channels, an array.
    figure_ : matplotlib Figure
        The figure that holds it.

    See Also
    --------
    LatentODEForecaster : The model that forecasts.

    Examples
    --------
    >>> import numpy as np
    >>> from skode import ForecastDisplay, LatentODEForecaster
    >>> hours = np.sort(np.random.default_rng(0).uniform(0, 48, size=50))
    >>> est = LatentODEForecaster((8,), encoder_size=8, max_iter=2, tol=0)
    >>> est = est.fit(hours[:, None], np.sin(hours / 4))
    >>> ahead = np.linspace(48, 60, 30)[:, None]
    >>> display = ForecastDisplay.from_estimator(est, ahead, n_paths=5)
    >>> display.intervals.shape
    (2, 30, 1, 2)
    """

    def __init__(
        self,
        *,
        times,
        median,
        intervals,
        coverage,
        channel_names,
        time_name="time",
        known_times=None,
        known=None,
        observed=None,
        paths=None,
    ):
        self.times = times
        self.median = median
        self.intervals = intervals
        self.coverage = coverage
        self.channel_names = channel_names
        self.time_name = time_name
        self.known_times = known_times
        self.known = known
        self.observed = observed
        self.paths = paths

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        history=None,
        series=None,
        channels=None,
        coverage=(0.5, 0.9),
        n_paths=0,
        random_state=None,
        ax=None,
        line_kw=None,
        band_kw=None,
        data_kw=None,
    ):
        """Plot forecasts of a fitted forecaster.

        Parameters
        ----------
        estimator : LatentODEForecaster
            Fitted. Of a `Pipeline`, pass the last step, and X as that sees it.
        X : DataFrame, Index or array-like of shape (n_rows, n_columns)
            Rows to forecast, as for `predict`: times close to each other make a smooth
            picture. Past times show how well the model describes what it knows.
        y : Series, DataFrame or array-like, default=None
            What was observed at the rows of X, to draw beside the forecasts; None: the
            channels among the columns of X, if `fit` found them there.
        history : DataFrame, array-like or tuple (X, y), default=None
            What the forecasts are conditioned on, as for `predict`.
        series : hashable, default=None
            Which series of X to draw; None: the only one.
        channels : sequence of int or str, default=None
            Which channels to draw, by position or name; None: all of them, but the
            first five of more.
        coverage : float or sequence of float, default=(0.5, 0.9)
            Probabilities of the intervals.
        n_paths : int, default=0
            How many sample paths to draw.
        random_state : int, RandomState instance or None, default=None
            Of these paths.
        ax : matplotlib Axes or array-like of Axes, default=None
            See `plot`.
        line_kw, band_kw, data_kw : dict, default=None
            See `plot`.

        Returns
        -------
        display : ForecastDisplay
            With the picture drawn. What is known of the series is drawn between the
            first and the last forecast; if all are ahead of it, its last context is.

        Raises
        ------
        TypeError
            If the estimator is no forecaster.
        ValueError
            If X holds several series and `series` does not name one, if `channels` are
            not there, or a coverage does not lie between 0 and 1.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        if not hasattr(estimator, "predict_quantiles"):
            raise TypeError(
                f"{type(estimator).__name__} has no intervals to draw: pass a "
                "LatentODEForecaster; of a pipeline, its last step."
            )
        coverage = _coverages(coverage)
        layout = estimator.layout_
        names = _channel_labels(layout.channel_names)
        chosen = _positions(channels, names, what="channels")
        # Before X is reduced to one series, so that rows of y are still those of X.
        table, values = layout.read(X), None
        if y is not None or _holds(X, layout):
            values = layout.read_observations(X, y).values
        place = _one_of(table.keys, series)
        rows = np.flatnonzero(table.codes == place)
        rows = rows[np.argsort(table.times[rows], kind="stable")]
        if len(rows) < len(table) or (np.diff(rows) < 0).any():
            X = _taken(X, rows)
        given = {} if history is None else {"history": history}
        tails = (1 - np.array(coverage)) / 2
        levels = [0.5, *tails, *(1 - tails)]
        found = np.asarray(estimator.predict_quantiles(X, levels, **given))
        found = found.reshape(len(rows), len(names), len(levels))[:, chosen]
        low, high = np.split(np.moveaxis(found[:, :, 1:], 2, 0), 2)
        axis = _TimeAxis.of(layout.clock, table.times[rows])
        shown = {
            "times": axis.drawn(table.times[rows]),
            "median": found[:, :, 0],
            "intervals": np.stack([low, high], axis=-1),
            "coverage": coverage,
            "channel_names": [names[channel] for channel in chosen],
            "time_name": axis.label(layout.time_name),
        }
        if values is not None:
            shown["observed"] = values[rows][:, chosen]
        known = estimator.histories_.get(table.keys[place])
        if history is not None:
            new = layout.read_history(history).histories()
            known = new.get(table.keys[place], known)
        if known is not None and len(known):
            near = _near(known, table.times[rows], estimator.windows_.context)
            shown["known_times"] = axis.drawn(known.exact[near])
            shown["known"] = known.values[near][:, chosen]
        if n_paths:
            drawn = estimator.sample_paths(
                X, n_paths, random_state=random_state, **given
            )
            paths = np.asarray(drawn)
            if hasattr(drawn, "columns"):  # the last of its levels tells the path
                paths = np.moveaxis(paths.reshape(len(rows), len(names), -1), 2, 0)
            paths = paths.reshape(n_paths, len(rows), len(names))
            shown["paths"] = paths[:, :, chosen]
        return cls(**shown).plot(
            ax=ax, line_kw=line_kw, band_kw=band_kw, data_kw=data_kw
        )

    def plot(self, ax=None, *, line_kw=None, band_kw=None, data_kw=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of Axes, default=None
            Where to draw; None makes a figure. Of several channels, an array of
            `n_channels`, or axes that give up their place to so many.
        line_kw : dict, default=None
            Passed to `plot`, which draws the median.
        band_kw : dict, default=None
            Passed to `fill_between`, which draws the intervals.
        data_kw : dict, default=None
            Passed to `plot`, which draws the dots.

        Returns
        -------
        display : ForecastDisplay
            This display, with `ax_` and `figure_`.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        k = len(self.channel_names)
        panels = _panels(ax, k, 1, figsize=(8.0, 1.4 + 2.2 * k)).ravel()
        self.ax_ = panels[0] if k == 1 else panels
        self.figure_ = panels[0].figure
        for channel, panel in enumerate(panels):
            self._draw_channel(panel, channel, line_kw or {}, band_kw or {})
            self._draw_dots(panel, channel, data_kw or {})
            panel.set_ylabel(self.channel_names[channel])
            panel.margins(x=0.01)
        if not np.iterable(ax):  # panels of our own
            for panel in panels[:-1]:
                panel.sharex(panels[-1])
                panel.tick_params(labelbottom=False)
        panels[-1].set_xlabel(self.time_name)
        if self.times.dtype.kind == "M":
            _date_axis(panels[-1])
        panels[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return self

    def _draw_channel(self, ax, channel, line_kw, band_kw):
        widest_first = np.argsort(self.coverage)[::-1]
        for shade, place in zip(_shades(len(self.coverage)), widest_first, strict=True):
            share = f"{100 * self.coverage[place]:g} % interval"
            band = {"color": shade, "linewidth": 0, "label": share, **band_kw}
            bounds = self.intervals[place, :, channel]
            ax.fill_between(self.times, *bounds.T, **band)
        if self.paths is not None:
            style = {"color": MODEL, "linewidth": 0.6, "alpha": 0.6}
            lines = ax.plot(self.times, self.paths[:, :, channel].T, **style)
            lines[0].set_label("sample paths")
        style = {"color": MODEL, "linewidth": 1.6, "label": "median", **line_kw}
        ax.plot(self.times, self.median[:, channel], **style)

    def _draw_dots(self, ax, channel, data_kw):
        for times, values, color, label in (
            (self.known_times, self.known, KNOWN, "known"),
            (self.times, self.observed, DATA, "observed"),
        ):
            if values is None:
                continue
            seen = ~np.isnan(values[:, channel])
            # Many dots would hide the bands under them.
            size = float(np.clip(36 / np.sqrt(max(1, seen.sum())), 1.5, 5.0))
            style = {"marker": "o", "markersize": size, "linestyle": "none"}
            style = {**style, "color": color, "label": label, **data_kw}
            ax.plot(times[seen], values[seen, channel], **style)


# ---------------------------------------------------------------------- estimators


def _rows_seen(estimator, X):
    """Return the last step, the rows it sees, or None, and the names of columns."""
    check_is_fitted(estimator)
    if isinstance(estimator, Pipeline):
        before, estimator = estimator[:-1], estimator[-1]
        if X is not None and len(before):
            X = before.transform(X)
    n_features = getattr(estimator, "n_features_in_", None)
    known = getattr(estimator, "feature_names_in_", None)
    names, data = getattr(X, "columns", known), None
    if known is not None and list(names) != list(known):
        raise ValueError(
            f"X must have the columns of fit, {list(known)}, got {list(names)}."
        )
    if X is not None:
        data = np.asarray(X, dtype=np.float64)
        if data.ndim != 2 or data.shape[1] != (n_features or data.shape[1]):
            raise ValueError(
                f"X must have shape (n_samples, {n_features}), as in fit, got "
                f"{data.shape}."
            )
        n_features = data.shape[1]
    if names is None:
        names = [f"x{column}" for column in range(n_features)]
    return estimator, data, [str(name) for name in names]


def _positions(columns, names, most=_MOST_COLUMNS, what="columns"):
    """Return the positions of the chosen columns, or channels."""
    if columns is None:
        return list(range(min(most, len(names))))
    if isinstance(columns, str) or not np.iterable(columns):
        columns = [columns]
    unknown = [
        column
        for column in columns
        if column not in names
        and not (not isinstance(column, str) and 0 <= column < len(names))
    ]
    if unknown or len(columns) == 0:
        raise ValueError(
            f"{what} must be positions below {len(names)} or names among {names}, "
            f"got {list(columns)}."
        )
    return [
        names.index(column) if isinstance(column, str) else int(column)
        for column in columns
    ]


def _labelled(estimator, rows):
    """Return rows as the frame that the estimator was fitted to, if it was."""
    names = getattr(estimator, "feature_names_in_", None)
    return rows if names is None else pd.DataFrame(rows, columns=names)


@dataclass(frozen=True, slots=True)
class _Density:
    """The log-density of a model, given y, of points in the order that is drawn."""

    estimator: object
    order: np.ndarray
    y: object

    def __call__(self, points):
        """Return (...,) for points of shape (..., k)."""
        rows = points.reshape(-1, len(self.order))[:, self.order]
        given = {} if self.y is None else {"y": _repeated(self.y, len(rows))}
        log_density = self.estimator.score_samples(
            _labelled(self.estimator, rows), **given
        )
        return np.asarray(log_density).reshape(points.shape[:-1])


def _is_seen(model, grid, data):
    """Whether a grid is fine enough: a peak at a repeated value would fall through."""
    some = data[np.linspace(0, len(data) - 1, min(len(data), 500)).astype(int)]
    half_a_step = [(axis[1] - axis[0]) / 2 for axis in grid]
    with np.errstate(invalid="ignore"):  # no density at either point: no fall
        falls = np.abs(model(some) - model(some + half_a_step))
    return np.mean(falls > _STEEP) < _MOST_UNSEEN


def _draw(estimator, n_samples, random_state, y):
    """Return rows of the model, whichever arguments its `sample` takes."""
    if not hasattr(estimator, "sample"):
        raise TypeError(
            f"{type(estimator).__name__} cannot draw samples, which a picture of some "
            "columns of several needs."
        )
    options = {} if y is None else {"y": _repeated(y, n_samples)}
    if "random_state" in inspect.signature(estimator.sample).parameters:
        options["random_state"] = random_state
    rows = estimator.sample(n_samples, **options)
    # `GaussianMixture` tells the component of each row, too.
    return np.asarray(rows[0] if isinstance(rows, tuple) else rows)


def _check_condition(estimator, y):
    """Refuse none, and several, where a picture is drawn given one."""
    conditional = getattr(estimator, "conditional", False)
    most = 0 if hasattr(estimator, "classes_") else 1
    if (y is None and conditional) or np.ndim(y) > most:
        got = "none" if y is None else f"shape {np.shape(y)}"
        raise ValueError(
            "A picture is drawn given one condition: pass y, one label, or one value "
            f"of each covariate, and as X the rows for which it holds; got {got}."
        )


def _repeated(y, n_rows):
    """Return one condition for each row: (n,) labels or (n, C) covariates."""
    return np.repeat(np.asarray(y)[None], n_rows, axis=0)


# ---------------------------------------------------------------------- series


def _coverages(coverage):
    coverage = np.unique(np.asarray(coverage, dtype=np.float64))
    if not len(coverage) or not ((coverage > 0) & (coverage < 1)).all():
        raise ValueError(f"coverage must lie between 0 and 1, got {coverage}.")
    return coverage.tolist()


def _channel_labels(names):
    """Return a label for each channel; those of arrays have positions for names."""
    if len(names) == 1 and (names[0] is None or isinstance(names[0], int)):
        return ["y"]
    return [f"y{name}" if isinstance(name, int) else str(name) for name in names]


def _holds(X, layout):
    """Whether X holds the channels, as it did in a fit without y."""
    columns = getattr(X, "columns", None)
    names = layout.channel_names
    return layout.own_channels and columns is not None and set(names) <= set(columns)


def _one_of(keys, series):
    """Return the position of the series to draw."""
    if series is None and len(keys) == 1:
        return 0
    if series is None or series not in keys:
        some = ", ".join(repr(key) for key in keys[:5])
        some += ", ..." if len(keys) > 5 else ""
        raise ValueError(
            f"series must name one of the {len(keys)} series of X, {some}; got "
            f"{series!r}."
        )
    return keys.index(series)


def _near(known, exact, span):
    """Return which known rows to draw beside forecasts at exact times, (n,) bool."""
    first, last = known.relative(exact[[0, -1]])
    if first > known.times[-1]:  # ahead: with the context
        first = -np.inf if span is None else known.times[-1] - span
    return (known.times >= first) & (known.times <= last)


def _taken(X, rows):
    """Return some rows of X, whatever it is."""
    if hasattr(X, "iloc"):
        return X.iloc[rows]
    return X[rows] if hasattr(X, "shape") else [X[row] for row in rows]


@dataclass(frozen=True, slots=True)
class _TimeAxis:
    """How exact times are drawn: stamps as such, differences in a fitting unit."""

    kind: str
    zone: str | None
    unit: str

    @classmethod
    def of(cls, clock, exact):
        """Return the axis for times as the estimator reads them, (n,)."""
        unit = ""
        if clock.kind == "delta":
            longest = np.abs(exact).max() / 1e9
            fitting = [unit for unit, size in _UNITS.items() if longest >= 2 * size]
            unit = fitting[0] if fitting else "seconds"
        return cls(clock.kind, clock.zone, unit)

    def drawn(self, exact):
        """Return stamps, in the hours of their zone, or numbers, (n,)."""
        if self.kind == "stamp":
            stamps = pd.DatetimeIndex(exact.astype("M8[ns]"))
            if self.zone is not None:
                local = stamps.tz_localize("UTC").tz_convert(self.zone)
                stamps = local.tz_localize(None)
            return stamps.to_numpy()
        return exact / (1e9 * _UNITS[self.unit]) if self.unit else exact

    def label(self, name):
        """Return the label of the axis."""
        name = "time" if name is None or isinstance(name, int) else str(name)
        what = self.zone or self.unit
        return f"{name} ({what})" if what else name


_UNITS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def _date_axis(ax):
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator()
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


# ---------------------------------------------------------------------- panels


def _panels(ax, n_rows, n_columns, size=2.2, triangle=False, figsize=None):
    """Return axes of shape (n_rows, n_columns): new, given, or in place of given."""
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.gridspec import GridSpecFromSubplotSpec

    shape, above = (n_rows, n_columns), np.zeros((n_rows, n_columns), dtype=bool)
    if triangle:
        above[np.triu_indices(n_rows, k=1)] = True
    if ax is None:
        if figsize is None:
            one = n_rows == n_columns == 1
            figsize = (5.6, 4.2) if one else (size * n_columns, size * n_rows)
        _, panels = plt.subplots(
            *shape, squeeze=False, figsize=figsize, layout="constrained"
        )
    elif not isinstance(ax, Axes):
        panels = np.asarray(ax, dtype=object)
        if panels.size != n_rows * n_columns:
            raise ValueError(
                f"ax must be axes, or an array of {n_rows} by {n_columns} of them, got "
                f"shape {panels.shape}."
            )
        panels = panels.reshape(shape)
    elif n_rows == n_columns == 1:
        return np.array([[ax]], dtype=object)
    else:
        if ax.get_subplotspec() is None:
            raise ValueError(
                "ax must be axes of a grid, such as subplots makes, to give up their "
                "place to several panels."
            )
        ax.set_axis_off()
        inner = GridSpecFromSubplotSpec(*shape, subplot_spec=ax.get_subplotspec())
        panels = inner.subplots(squeeze=False)
    for panel in panels[above]:
        panel.remove()
    panels[above] = None
    return panels


def _limits(values, margin=0.2):
    """Return the range of the values, and a margin on each side, a share of it."""
    low, high = values.min(), values.max()
    margin = margin * (high - low) or 0.5
    return low - margin, high + margin


def _ends(grid):
    return grid[0], grid[-1]


def _bins(n_rows, limits):
    """Return edges of bins that hold enough rows to be quiet."""
    return np.linspace(*limits, int(np.clip(2.5 * np.cbrt(n_rows), 10, 60)) + 1)


def _histogram(ax, values, bins, style):
    """Draw shares of all values, of which some may lie outside the bins."""
    style = {"bins": bins, "color": DATA, "alpha": 0.35, "label": "data", **style}
    limits = bins[0], bins[-1]
    counts, bins = np.histogram(values, style.pop("bins"), range=limits)
    ax.hist(bins[:-1], bins, weights=counts / (len(values) * np.diff(bins)), **style)


def _dots(ax, rows, style):
    # Many rows would hide the density under them.
    size = float(np.clip(4000 / len(rows), 3.0, 12.0))
    style = {"s": size, "color": DATA, "alpha": 0.7, "linewidths": 0, **style}
    ax.scatter(*rows.T, **style)


def _regions(ax, x, y, density, levels, style):
    """Fill the regions of highest density that hold given shares of the whole."""
    heights = np.unique([*_heights(density, levels), density.max()])
    if len(heights) < 2:  # the same everywhere
        return
    if not {"colors", "cmap"} & style.keys():
        # Evenly spaced by share: by height, all but the innermost would look the same.
        style = {"colors": _shades(len(heights) - 1), **style}
    ax.contourf(x, y, density, levels=heights, **style)


def _heights(density, levels):
    """Return the density at the border of each region."""
    falling = np.sort(density, axis=None)[::-1]
    share = np.cumsum(falling) / falling.sum()
    return falling[np.searchsorted(share, levels).clip(max=len(falling) - 1)]


def _smooth_histogram(x, y, x_limits, y_limits):
    """Return grids along both axes, and the density of samples there."""
    edges = [np.linspace(*limits, 81) for limits in (x_limits, y_limits)]
    counts, *_ = np.histogram2d(x, y, bins=edges)
    centres = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    return (*centres, gaussian_filter(counts.T, 2.0))


def _hues(starts):
    """Return a colour for each start: its direction from the middle of all."""
    from matplotlib.colors import LinearSegmentedColormap

    spread = starts.std(axis=0)
    centred = (starts - starts.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    turns = np.arctan2(centred[:, -1], centred[:, 0]) / (2 * np.pi)
    wheel = LinearSegmentedColormap.from_list("wheel", _WHEEL)
    return wheel(turns % 1.0)


def _shades(n):
    """Return n colours, from nearly white to that of the model."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", _SHADES)(np.linspace(0, 1, n))


def _check_levels(levels):
    levels = np.asarray(levels, dtype=np.float64)
    if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"levels must be shares between 0 and 1, got {levels}.")
