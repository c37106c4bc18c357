"""Object detectors for photographs, each behind `rewards.detector.Detector`."""
