"""The procedural world "shapes": scenes, their pictures, their captions, and facts to check captions against."""
