"""Neural ordinary differential equations for scikit-learn."""
