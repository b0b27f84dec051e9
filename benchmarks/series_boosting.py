"""Boosted trees on lags, gaps and leads: a peer of `series.py`.

From the last observations of every channel, how long ago they were, and a few sums of
the past, scikit-learn's trees say any later time directly.
"""

import time

import numpy as np
from series_view import Fitted, by_quantiles, last_seen
from sklearn.ensemble import HistGradientBoostingRegressor

LAGS = 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ROWS = 60_000
"""Most rows that boosting learns from."""
FEWEST = 500
"""Rows that must have a feature at all, else it is left out."""


def summary(series, channels):
    """Return what boosting knows of a past, before it is asked of a time."""
    out, last = [], []
    for c in range(channels):
        t, x = last_seen(series, c, len(series))
        padded = np.full((2, LAGS), np.nan)
        recent = min(len(t), LAGS)
        if recent:
            padded[0, -recent:], padded[1, -recent:] = x[-recent:], t[-recent:]
        lines = []
        for count in (LAGS, len(t)):
            tail, values = t[-count:], x[-count:]
            moving = len(tail) > 1 and tail[-1] > tail[0]
            slope = np.cov(tail, values, bias=True)[0, 1] / tail.var() if moving else 0
            level = values.mean() if len(values) else 0.0
            lines += [level, values.std() if len(values) else 0.0, slope]
        lines += [x.min(), x.max(), x[0]] if len(x) else [0.0] * 3
        out.append((padded, np.array(lines), len(t)))
        last.append(x[-1] if len(x) else 0.0)
    return out, np.array(last)


def features(series, times, view):
    """Return (rows, features) and the last values (D,)."""
    per_channel, last = summary(series, view.channels)
    lead = times - series.t[-1]
    columns = [lead, times - series.t[0]]
    if view.dated:
        columns += [np.sin(2 * np.pi * times), np.cos(2 * np.pi * times)]
        year = np.full(len(times), 2 * np.pi * series.t[-1])
        columns += [np.sin(year), np.cos(year)]
    for channel, ((values, stamps), lines, count) in enumerate(per_channel):
        recent, whole = lines[:3], lines[3:6]
        # Trees know no level beyond those they saw: a rising record's are relative.
        base = last[channel] if view.alone else 0.0
        columns += [np.full(len(times), v - base) for v in values]
        columns += [times - stamp for stamp in stamps]
        columns += [np.full(len(times), v) for v in (*recent[1:], *whole[1:])]
        columns += [np.full(len(times), v - base) for v in (recent[0], *lines[6:])]
        columns += [recent[2] * lead, whole[2] * lead]
        columns += [np.full(len(times), count)]
    return np.stack(columns, axis=1), last


def fit_boosting(view, budget, seed):
    """Boosted trees of the mean and of five quantiles, per channel.

    What they learn, the value or its change since the last one, and when they stop, is
    chosen on a tenth of the training series.
    """
    started = time.process_time()
    rng = np.random.default_rng(seed)
    # More pasts of the same few patients would only make leaves of one patient each.
    pairs = list(view.examples(rng, 8000 if view.alone else 10 * len(view.train)))
    each = max(ROWS // len(pairs), 4)
    held = rng.random(len(view.train) if not view.alone else 500) < 0.1
    inputs, targets, lasts, kept_out = [], [], [], []
    groups = {}
    for past, future in pairs:
        group = groups.setdefault((past.t[0], past.x[0].tobytes()), len(groups))
        rows = rng.permutation(len(future))[:each]
        table, last = features(past, future.t[rows], view)
        inputs.append(table)
        targets.append(future.x[rows])
        lasts.append(np.broadcast_to(last, targets[-1].shape))
        kept_out.append(np.full(len(rows), held[group]))
    X, y, last = np.concatenate(inputs), np.concatenate(targets), np.concatenate(lasts)
    checks = np.concatenate(kept_out)
    # Lags that hardly any past has: trees cannot bin a column of nothing but NaN.
    common = np.isfinite(X).sum(axis=0) > FEWEST
    X = X[:, common]

    def learn(channel, change, limit, **params):
        target = y[:, channel] - change * last[:, channel]
        known = ~np.isnan(target)
        a, b = known & ~checks, known & checks
        if limit < a.sum():
            a &= rng.random(len(a)) < limit / a.sum()
        model = HistGradientBoostingRegressor(
            max_iter=600,
            learning_rate=0.08,
            min_samples_leaf=20,
            l2_regularization=1.0,
            early_stopping=True,
            n_iter_no_change=15,
            random_state=seed,
            **params,
        )
        return model.fit(X[a], target[a], X_val=X[b], y_val=target[b])

    chosen = []
    for channel in range(view.channels):
        # A record that rises is asked for beyond the values it was trained on.
        tried = (1,) if view.alone else (0, 1)
        models = {c: learn(channel, c, ROWS // 4) for c in tried}
        # The two targets differ by a known number, so that their losses compare.
        change = max(tried, key=lambda c: models[c].validation_score_.max())
        chosen.append((change, learn(channel, change, ROWS)))
    # Fits take as long as they have rows: what is left of the budget decides.
    left = started + budget - time.process_time()
    fits = len(QUANTILES) * view.channels
    share = left / fits / max((budget - left) / view.channels / 1.5, 1e-3)
    limit = int(ROWS * np.clip(share, 0.05, 1.0))
    models = []
    for channel, (change, mean) in enumerate(chosen):
        at = [
            learn(channel, change, limit, loss="quantile", quantile=q)
            for q in QUANTILES
        ]
        models.append((change, mean, at))

    def predict():
        pairs = list(zip(view.recent(), view.asked, strict=True))
        made = [features(known, times, view) for known, times in pairs]
        table = view.gather([columns[:, common] for columns, _ in made])
        ahead = view.gather([(times > known.t[-1])[:, None] for known, times in pairs])
        shape = (len(table), view.channels)
        last = view.gather(
            [
                np.tile(x, (len(times), 1))
                for (_, times), (_, x) in zip(pairs, made, strict=True)
            ]
        )
        mean, cuts = np.empty(shape), np.empty((*shape, len(QUANTILES)))
        for c, (change, middle, at) in enumerate(models):
            mean[:, c] = middle.predict(table) + change * last[:, c]
            for k, model in enumerate(at):
                cuts[:, c, k] = model.predict(table) + change * last[:, c]
        return by_quantiles(np.where(ahead == 1, mean, np.nan), QUANTILES, cuts)

    return Fitted(predict, f"{len(y)} rows")
