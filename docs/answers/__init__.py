"""What is right in the exercises, computed by `glm`."""
