"""The engines that run the teacher, behind one interface."""
