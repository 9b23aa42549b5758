"""Camera layouts in words: what a model that has never seen a camera grid must be told (METHOD: paper supplement E)."""

LAYOUTS = {
    "none": "",
    "robocasa": (
        "Four panels, two above two, show one robot arm in a kitchen at the same time: the left camera at the top left, the "
        "right camera at the top right, the wrist camera at the bottom left; the bottom right stays black."
    ),
    "libero": (
        "Four panels, two above two, show one robot arm at a table at the same time: the front camera at the top left, the wrist "
        "camera at the top right; the bottom row stays black."
    ),
    "metaworld": (
        "Four panels, two above two, show one robot arm over a table at the same time: the corner camera at the top left, the "
        "gripper's camera at the top right; the bottom row stays black."
    ),
}
"""Name -> text that goes before each skill prompt."""
