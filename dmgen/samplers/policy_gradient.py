"""The trained samplers by name: each is an advantage and a rule for the proposal."""

from __future__ import annotations

from dmgen.samplers.trainer import Trainer


class DPG(Trainer):
    """Distributional policy gradient, on-policy: A = P/(Zπ). Parshakova et al. 2019."""

    method = "dpg"
    default_proposal_rule = "policy"


class GDC(Trainer):
    """KL-adaptive DPG: A = P/(Zq), q a frozen copy that follows the policy. Khalifa et al. 2021."""

    method = "gdc"
    default_proposal_rule = "kl"


class GDCpp(Trainer):
    """GDC++: A = P/(Zq) − π/q, which is 0 for every text when π = p. Korbak et al. 2022."""

    method = "gdc++"
    default_proposal_rule = "kl"
