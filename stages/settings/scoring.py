"""Settings of distances between sets of pictures: what Inception is shown of each picture."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import Settings

# Pillow's filters, which shrink with antialiasing, and torch's bilinear one without it.
Resize = Literal["bicubic", "bilinear", "lanczos", "box", "bilinear_aliased"]


class Alteration(Settings):
    """What is done to a picture that hardly anybody would see, to learn what a distance makes of it.

    Blur and JPEG come after the picture was made smaller, in this order."""

    resize: Resize | None = None
    """Filter in place of `eval.distances.resize`; null: that one."""
    blur: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Standard deviation of a Gaussian blur, px; null: none."""
    jpeg: Annotated[int, Field(ge=1, le=100)] | None = None
    """Quality of a JPEG that the picture is stored as in between; null: none."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.resize or self.blur or self.jpeg):
            raise ValueError("changes nothing; give jpeg, blur or resize")
        return self
