"""The gates that a version passes before it gets traffic. They run in the scratch process (`fairlead.control.scratch`)."""
