"""DemoPSD (arXiv 2607.02502): SRPO whose distilled tokens weigh less where the demonstration changes most.

weight of a token   (1 − α_t) · exp(−β_H · H_t) ÷ mean        α_t = 2 · α_max · (σ(β · JSD(S‖T)_t) − ½)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_srpo.algorithms.srpo import Srpo

if TYPE_CHECKING:
    from torch import Tensor


class DemoPsd(Srpo):
    """What a teacher says only because it reads the answer is far from what the student says."""

    title: ClassVar[str] = "DemoPSD"
    colour: ClassVar[str] = ""
    weighs_tokens: ClassVar[bool] = True
    name: Literal["demopsd"] = "demopsd"  # type: ignore[assignment]
    damping_max: float = Field(0.15, ge=0, le=1)
    """Largest share α_max of a distilled token's weight that a large divergence takes away."""
    damping_rate: float = Field(50.0, ge=0)
    """Rate at which the share grows with the Jensen–Shannon divergence in nats. The paper uses 25 to 100."""

    def token_weights(self, divergence: Tensor) -> Tensor:
        return 1 - 2 * self.damping_max * ((self.damping_rate * divergence).sigmoid() - 0.5)
