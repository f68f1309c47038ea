"""What is measured, in words: the names that tables, files and pictures use."""

from __future__ import annotations

# Of one model at one point.
MEASURES: dict[str, str] = {
    "loss": "cross-entropy of the true label",
    "gradient_l1": "L1 norm of the input gradient of the loss",
    "gradient_l2": "L2 norm of the input gradient of the loss",
    "curvature": "largest eigenvalue of the loss's Hessian with respect to the pixels",
    "curvature_residual": "how far the eigenpair is from exact: |H v - lambda v| over |lambda|",
    "lipschitz": "largest change of the input gradient over the distance, between the point and others near it",
    "rise_worst": "most that the loss rises within the radius, as found by ascent",
    "rise_mean": "mean rise of the loss at random points of the ball of that radius",
    "nonlinearity": "gap between the loss and its linear model along the gradient's sign, as a share of the rise",
}
# Of a model and another, at the model's point.
PAIR_MEASURES: dict[str, str] = {
    "gradient_cosine": "cosine between the input gradients of the two models' losses",
    "kl": "KL divergence from the other model's prediction to the model's, in nats",
    "agreement": "1 where both predict the same class, else 0",
    "fooled": "1 where the other model is wrong there, else 0; after the attack this is transfer",
}
# Those that say how well another was computed, and not how models differ.
DIAGNOSTICS = ("curvature_residual",)
