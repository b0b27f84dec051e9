"""Neural ordinary differential equations for scikit-learn."""

from skode.supervised import ODEClassifier, ODERegressor

__all__ = ["ODEClassifier", "ODERegressor"]
