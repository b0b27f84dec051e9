"""
=================================
When things happen: event times
=================================

Sometimes it tells as much when something was measured as what: a tracker logs more when
its wearer is awake, a patient in trouble is seen more often. With
``event_times="poisson"`` the model learns the intensity of the rows, too: how many of
them are expected per day, at any time.

The data are simulated, so that the true intensity is known: people log their load
around the top of a daily rhythm, whose hour differs between people.

Run it with ``python examples/plot_event_times.py``, after which the name of another
picture may stand. It takes about 20 seconds on one core.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.dates import DateFormatter, DayLocator

from skode import ForecastDisplay, LatentODEForecaster

torch.set_num_threads(1)  # more do not help on a table this small
MIDNIGHT = pd.Timestamp("2024-03-01")

# %%
# A simulated log
# ---------------
# Rows come from a Poisson process: candidates at the highest rate, each kept with the
# probability that the rate is of the highest.


def rate(day, peak):
    """Return the true rows per day."""
    return 2 + 10 * np.exp(3 * np.cos(2 * np.pi * (day - peak)) - 3)


def log_of(person, n_days, rng):
    peak = rng.uniform()
    day = np.sort(rng.uniform(0, n_days, rng.poisson(12 * n_days)))
    day = day[12 * rng.random(len(day)) < rate(day, peak)]
    load = np.cos(2 * np.pi * (day - peak)) + 0.2 * rng.normal(size=len(day))
    time = MIDNIGHT + pd.to_timedelta(day, unit="D")
    log = pd.DataFrame({"person": person, "time": time, "load": load})
    return log, peak


rng = np.random.default_rng(0)
log = pd.concat([log_of(f"p{k}", 3, rng)[0] for k in range(200)], ignore_index=True)
print(f"{len(log)} rows of 200 people in three days")

# %%
# Fit
# ---
# ``max_iter`` is low, to be quick.

model = LatentODEForecaster(
    time="time",
    series="person",
    event_times="poisson",
    max_iter=90,
    tol=0,
    random_state=0,
)
model.fit(log[["person", "time"]], log["load"])

# %%
# When will new people log next?
# ------------------------------
# Two days of each are known, and the third is asked for. Times here are stamps, so that
# the intensity is per day; of numeric times it is per unit. The other forecast is each
# person's own mean, of rows per day.

times = MIDNIGHT + pd.to_timedelta(np.arange(2, 3, 1 / 96), unit="D")
day = np.asarray((times - MIDNIGHT) / pd.Timedelta("1D"))
truth, found, mean, people = [], [], [], {}
for k in range(30):
    history, peak = log_of(f"new-{k}", 2, rng)
    ahead = pd.DataFrame({"person": f"new-{k}", "time": times})
    truth.append(rate(day, peak))
    found.append(model.intensity(ahead, history=history))
    mean.append(np.full(len(day), len(history) / 2))
    people[f"new-{k}"] = history, ahead, truth[-1], found[-1]
for name, intensity in (("model", found), ("own mean", mean)):
    error = np.asarray(intensity) - np.asarray(truth)
    print(f"{name:>10}: error {np.sqrt(np.mean(error**2)):.2f} rows per day (RMS)")

# %%
# The integral of the intensity is the number of rows to be expected.

expected = np.mean(np.mean(found, axis=1))
print(f"{expected:.1f} rows expected on the third day, {np.mean(truth):.1f} in truth")

# %%
# The picture
# -----------
# Three people. Above: what they logged, and the forecast of what they would log. Below:
# when, with the intensity, per day.

plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (above, below) = plt.subplots(
    2, 3, figsize=(11, 5.6), layout="constrained", sharex=True, sharey="row"
)
for column, name in enumerate(["new-0", "new-1", "new-2"]):
    history, ahead, true, ours = people[name]
    top, bottom = above[column], below[column]
    ForecastDisplay.from_estimator(model, ahead, history=history, ax=top)
    top.set(title=name, xlabel="", ylabel="load" if column == 0 else "")
    bottom.plot(times, true, color="#8d99ae", linestyle="--", label="true intensity")
    bottom.plot(times, ours, color="#2a6f97", label="intensity")
    rug = {"marker": "|", "linestyle": "none", "color": "#3d4451", "label": "rows"}
    bottom.plot(history["time"], np.full(len(history), 0.3), **rug)
    bottom.set(ylim=(0, None), ylabel="rows per day" if column == 0 else "")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=column == 0)
    bottom.xaxis.set_major_locator(DayLocator())
    bottom.xaxis.set_major_formatter(DateFormatter("%b %d"))
    top.tick_params(labelbottom=False)
    if column < 2:
        top.get_legend().remove()
below[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "event_times.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
