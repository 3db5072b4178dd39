"""What watches a deployment: rules for Prometheus, dashboards for Grafana. See prometheus.yaml and alerts.yaml."""
